"""tools/fuzz.py: its targets accept any bytes, and what fuzzing has found stays mended."""

import random

import pytest
from fuzz import NAMES
from fuzzing.targets import TARGETS

FOUND = {
    "config": [
        b"run:\n  out_dir: \x91\n",  # no UTF-8
        b"when: 2026-13-01\n",  # read as a date
        b"[" * 3000,
    ],
    "model_config": [
        b'{"model_type": "\x9c"}',
        b"[]",
        b'{"model_type": "qwen2_5_vl", "text_config": 3}',
        b'{"model_type": "qwen3_vl", "text_config": {}, "vision_config": "x"}',
    ],
    "stored_rollouts": [b'{"version": 1, "phase": "\xb5"}'],
    "worker_messages": [
        b"\x83\xa7request\x84\xa2id\xa1a\xa9token_ids\x83\xa5dtype\xa1,\xa5shape\x91\x03\xa4data"
        b"\xc4\x00\xb0engine_token_ids\x90\xa7visuals\x90\xa4spec\x80\xa7version\x01",
    ],
}


def test_every_target_has_a_name() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_targets_accept_changed_seeds(name: str) -> None:
    rng, target = random.Random(0), TARGETS[name]
    for seed in target.seeds:
        target.run(seed)
        for _ in range(10):
            changed = bytearray(seed)
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            target.run(bytes(changed))
        target.run(seed[: len(seed) // 2])


@pytest.mark.parametrize("name", FOUND)
def test_findings_are_mended(name: str) -> None:
    for data in FOUND[name]:
        TARGETS[name].run(data)


def test_a_model_with_a_value_of_a_wrong_type_is_one_sentence() -> None:
    target = TARGETS["model_config"]
    for wrong in (b'"2048"', b"null", b"[]", b"-0.5"):
        target.run(target.seeds[0].replace(b'"hidden_size": 2048', b'"hidden_size": ' + wrong))
