"""Faults in divergence: in the kernel that all paths share, and in the plain torch beside it."""

from __future__ import annotations

from mutants.mutant import Mutant

_KERNEL_TESTS = ("tests/sanitizers/test_sanitizers.py", "-k", "portable")
_PLAIN_TESTS = ("tests/ops/test_divergence.py", "-k", "reference")


def _fault(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/cpu/kernels/divergence.h", old, new, _KERNEL_TESTS)


def _plain(name: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(name, f"ghosted_fast/ops/{file}", old, new, _PLAIN_TESTS)


MUTANTS = (
    _fault("words beyond the last counted", "v[lane] = beyond;", "v[lane] = 0.0f;"),
    _fault(
        "largest logit of p among words beyond the last",
        "larger(load_logits<kType>(p, i, count, kLowest), p_lanes)",
        "larger(load_logits<kType>(p, i, count, 0.0f), p_lanes)",
    ),
    _fault(
        "largest logit of q among words beyond the last",
        "larger(load_logits<kType>(q, i, count, kLowest), q_lanes)",
        "larger(load_logits<kType>(q, i, count, 0.0f), q_lanes)",
    ),
    _fault(
        "scales of the gradient swapped",
        "exp_of_negative(b) * q_scale - exp_of_negative(a) * p_scale",
        "exp_of_negative(b) * p_scale - exp_of_negative(a) * q_scale",
    ),
    _fault(
        "sums in fp32 to the end of a row",
        "if (++vectors % kVectorsInFloat != 0) return;",
        "if (++vectors % kVectorsInFloat <= kVectorsInFloat) return;",
    ),
    _fault(
        "half of a sum's lanes lost",
        "const VecD lanes = low + high;",
        "const VecD lanes = low + low;",
    ),
    _fault(
        "rows that do not count looked at",
        "if (args.counted != nullptr && !args.counted[row]) {",
        "if (args.counted != nullptr && false) {",
    ),
    _fault(
        "sums of a row that does not count left as they were",
        "      std::memset(found, 0, kFound * sizeof(double));\n",
        "",
    ),
    _fault(
        "logarithms of the sums swapped",
        "+ std::log(q_sum) - std::log(p_sum);",
        "+ std::log(p_sum) - std::log(q_sum);",
    ),
    _fault(
        "slope without p",
        "found[1 + k] = mean[k] - p_moved[k].total() / p_sum;",
        "found[1 + k] = mean[k];",
    ),
    _fault(
        "curvature about zero",
        "q_products[pair].total() / q_sum - mean[k] * mean[j];",
        "q_products[pair].total() / q_sum;",
    ),
    _fault(
        "every way paired with itself alone",
        "q_products[pair++].part += weighted * change[j];",
        "q_products[pair++].part += weighted * change[k];",
    ),
    _fault(
        "ln 2 without its second part",
        "  r = r + n * broadcast(2.12194440054690583e-4f);\n",
        "",
    ),
    _plain(
        "one triangle of the curvature",
        "divergence.py",
        "mirror_lower(lower)",
        "lower",
    ),
    _plain(
        "diagonal of the curvature twice",
        "reference.py",
        "matrix.tril(-1).mT",
        "matrix.mT",
    ),
    _plain(
        "plain: words that neither says",
        "reference.py",
        "torch.where(p == 0, 0.0, p * (log_p - log_q))",
        "p * (log_p - log_q)",
    ),
    _plain(
        "plain: words that do not move",
        "reference.py",
        "torch.where(logits[chosen] == smaller[chosen], 0.0, logits[chosen].to(dtype) - here)",
        "logits[chosen].to(dtype) - here",
    ),
    _plain(
        "plain: gradient of the wrong sign",
        "reference.py",
        "(q - p).to(gradient.dtype)",
        "(p - q).to(gradient.dtype)",
    ),
)
