"""Where a run's numbers come from: what changes what."""

from dataclasses import replace

import pytest
import torch
from notebook import prepared

from qfbench.runs.provenance import protocol, provenance


def provenance_of(run):
    return provenance(0, protocol(run.lm), run.facts)


def test_suite_hash_and_model_hash_name_the_facts_and_the_weights(tmp_path):
    run = prepared(tmp_path)
    found = provenance_of(run)
    assert provenance_of(prepared(tmp_path)) == found
    run.facts[2] = replace(run.facts[2], probes=(replace(run.facts[2].probes[0], query="Who?"),))
    other_suite = provenance_of(run)
    assert other_suite["facts"] == found["facts"]
    assert other_suite["suite_hash"] != found["suite_hash"]
    assert other_suite["model_hash"] == found["model_hash"]
    run.lm.model.weight[0, 0] = 1e-30
    assert provenance_of(run)["model_hash"] != found["model_hash"]
    assert provenance_of(run)["suite_hash"] == other_suite["suite_hash"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 5}, "batch_size"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"name": "other"}, "model"),
    ],
)
def test_a_protocol_names_each_setting_of_a_model_by_itself(tiny, change, named):
    lm = tiny("qwen2")
    before, after = protocol(lm), protocol(replace(lm, **change))
    assert {name for name in before if before[name] != after[name]} == {named}


def test_a_protocol_names_the_tokenizer_the_template_and_the_dtype(tiny, plain_tokenizer):
    lm = tiny("qwen2")
    before = protocol(lm)
    plain = protocol(replace(lm, tokenizer=plain_tokenizer))
    assert {name for name in before if before[name] != plain[name]} == {"tokenizer_hash", "config_hash", "prompt_hash"}
    half = protocol(tiny("qwen2", torch.bfloat16))
    assert {name for name in before if before[name] != half[name]} == {"dtype", "model_hash"}
    assert half["dtype"] == "bfloat16"


def test_provenance_holds_the_protocol_and_the_seed_as_given(tmp_path):
    run = prepared(tmp_path)
    found = provenance(7, {"model": "m", "probes": 9}, run.facts)
    assert (found["model"], found["probes"], found["seed"]) == ("m", 9, 7)
    assert found["suite_hash"] == provenance_of(run)["suite_hash"]  # which no model changes
