"""Ghosted models in engines that serve: plug-ins which those engines load by themselves."""
