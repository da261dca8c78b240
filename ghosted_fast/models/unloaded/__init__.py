"""Models that are not in memory as a whole: left in their files, or shared out among the ranks."""
