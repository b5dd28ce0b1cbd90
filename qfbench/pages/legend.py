"""What columns and lines of tables mean, in plain words."""

from qfbench.analysis.catalogue import MEASURES

# Beside the measures.
COLUMNS = {
    "asked": "chat: by the model's chat template; plain: by the suite's own prompts alone",
    "before": "share of the questions answered right by the unedited model",
    "after": "the same of the edited model, after the last edit (single: after each that was checked)",
    "drop": "before − after, on the same questions",
    "p": "McNemar's exact test of the drop; the largest over orders and edits",
    "detectable": "the smallest true drop that so many questions show (5% level, 80% power)",
    "shift": "mean change of the right answer's log-probability, in nats",
    "norm": "size of the change: ‖ΔW‖ / ‖W‖ of the changed weights",
    "facts": "how many facts both sides were asked about",
    "against": "what the differences are from",
    "immediate": "mean of R[k, k], result on each fact right after its own edit",
    "final": "mean of R[N, k], result on each fact after the last of N edits",
    "forgetting": "what facts have lost since they were known best: mean over k of max R[n, k] − R[N, k]",
    "half_life": "after how many further edits facts are answered half as often (empty: never)",
    "first": "after how many edits the first fact was last answered",
    "collapse": "the edit after which prior knowledge is under half of its start (empty: never, or of under 10 questions)",
    "edits": "edits so far",
    "edits_done": "edits so far, where runs differ in how many they make",
    "relative_norm": "‖ΔW‖ / ‖W‖ of the changed weights, Frobenius norms",
    "top": "largest singular value of ΔW over ‖W‖",
    "overlap": "largest overlap of the newest keys with those of earlier edits (1: they are the same directions)",
    "rounding_loss": "share of ΔW that is lost when it is written in the model's number format",
    "solve_condition": "condition number of the solve",
    "solve_residual": "how far the solution misses its targets (0: each is met)",
}
LINES = {
    "unedited": "the model before any edit: the floor",
    "in_context": "the unedited model with the fact's instruction in its prompt: the ceiling",
    "single": "each fact alone, from the unedited model",
    "sequential": "each fact on what the edits before it left",
    "joint": "all facts so far, solved together",
    "protected": "each fact kept out of the way of the earlier ones",
    "placebo": "a random change of the same rank and size: what such a change does by itself",
}


def columns() -> dict[str, str]:
    """The meaning of every column, those of the measures with when they collapse."""
    doubled = "the edit after which {} is over twice its start (empty: never)".format
    fallen = {
        m.collapse: doubled(m.name) if m.nats else f"the same of {m.name}" for m in MEASURES.values() if m.collapse
    }
    return {name: measure.legend for name, measure in MEASURES.items()} | fallen | COLUMNS
