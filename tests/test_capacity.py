"""The capacity study, on the smallest model and by hand; and `at_most`."""

from hydra.utils import instantiate
from notebook import prepared
from rich.console import Console
from test_contract import composed

from qfbench.analysis.measures import capacity
from qfbench.commands.execution import execute
from qfbench.editors.regimes import sequential
from qfbench.tasks.retention import retention


def test_keys_are_counted_and_facts_kept_below_the_width(tmp_path):
    cfg = composed("experiment=capacity", "model=world-xs", "edits=4", "task.capacity.every=2")
    cfg.task.capacity.regimes.joint = cfg.regime.joint
    del cfg.hydra
    rows = execute(cfg, tmp_path, Console(quiet=True)).rows("capacity")
    curve = capacity(rows)
    assert list(curve.regime.unique()) == ["joint", "protected"]
    joint, protected = (curve[curve.regime == name].reset_index(drop=True) for name in ("joint", "protected"))
    assert list(joint.facts) == list(protected.facts) == [2, 4]
    assert list(joint["keys"]) == list(protected["keys"])  # in all, however the regime solves for them
    taught = rows[(rows.regime == "protected") & rows.fresh.astype(bool) & (rows.kind == "edit")]
    assert list(joint["keys"]) == [taught.solve_tokens[:2].sum(), taught.solve_tokens.sum()]
    assert (joint.retention == 1).all()
    assert (joint.residual < 1e-6).all()
    assert joint.norm.is_monotonic_increasing
    assert {p.name for p in tmp_path.glob("figures/*")} == {"capacity.png", "capacity.pdf"}


def test_at_most_so_many_probes_of_each_kind_are_asked_at_a_checkpoint(tmp_path):
    asked = []
    for most in (None, 1):
        run = prepared(tmp_path)
        retention(run, {"sequential": sequential}, at_most=most, placebo=0)
        edited = run.rows().query("condition == 'edited' and step == 1")
        asked.append(edited.kind.value_counts().to_dict())
    everything, few = asked
    assert everything["prior"] > few["prior"] == 1
    assert few["edit"] == everything["edit"]


def test_the_task_takes_the_regimes_of_the_configuration():
    assert set(instantiate(composed("experiment=capacity").task).capacity.keywords["regimes"]) == {"joint", "protected"}
