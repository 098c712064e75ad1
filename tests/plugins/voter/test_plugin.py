"""The voter in generations and in runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt_core import ConfigError, GenerationRequest, hookimpl
from apt_core.inference import generate
from apt_core.kernel import boot
from apt_core.testing import TINY_PROFILE, tiny_run, tiny_session
from apt_plugins.voter.plugin import Plugin

VOTER = "apt_plugins.voter.plugin"
ROOT = Path(__file__).parents[3]


def booted(voting=None, schedules=None):
    model = {**TINY_PROFILE["model"], "voting": voting or {}}
    data = {**TINY_PROFILE, "model": model, "schedules": schedules or {}}
    return boot(data, plugins=[VOTER], files=False)


def test_a_vote_that_is_never_triggered_is_plain_decoding_token_for_token(continuation, caplog):
    caplog.set_level("INFO", "apt.voter")
    voting = {"threshold": 100.0}
    assert continuation(voting=voting)[0] == continuation()[0]
    assert "0 of 24 tokens were put to the vote" in caplog.text


def test_uncertain_tokens_are_voted_on_and_counted(continuation, caplog):
    caplog.set_level("INFO", "apt.voter")
    voting = {"threshold": 0.0}
    tokens, manager = continuation(voting=voting)
    assert tokens != continuation()[0]
    assert continuation(voting=voting)[0] == tokens
    assert "24 of 24 tokens were put to the vote" in caplog.text
    assert manager.records["voter"].failures == []


def test_tokens_before_the_first_vote_are_those_of_plain_decoding(continuation, caplog):
    caplog.set_level("INFO", "apt.voter")
    plain = continuation(max_new_tokens=40)[0]
    seen = []

    class Watches:
        @hookimpl
        def apt_logits_processors(self):
            def watch(input_ids, logits):
                seen.append(float(torch.special.entr((logits / 0.8).softmax(-1)).sum()))
                return logits

            return [watch]

    continuation(Watches(), max_new_tokens=40)
    # So high that the first vote comes late.
    threshold = max(seen)
    first = seen.index(threshold)
    assert first > 2
    voting = {"threshold": threshold - 1e-6}
    voted = continuation(voting=voting, max_new_tokens=40)[0]
    assert voted[:first] == plain[:first]
    assert "0 of 40" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "request_"), [({"k": 1}, {}), ({"threshold": 0.0}, {"temperature": 0.0})]
)
def test_one_voter_and_temperature_zero_are_plain_decoding(
    continuation, caplog, settings, request_
):
    caplog.set_level("INFO", "apt.voter")
    voting = {"threshold": 0.0, **settings}
    assert continuation(voting=voting, **request_)[0] == continuation(**request_)[0]
    assert "put to the vote" not in caplog.text


def test_a_voter_that_fails_leaves_plain_sampling(continuation, monkeypatch):
    from apt_plugins.voter.decoder import VotingDecoder

    def fails(self, input_ids, logits, branches):
        raise RuntimeError("no quorum")

    voting = {"threshold": 0.0}
    monkeypatch.setattr(VotingDecoder, "choose", fails)
    tokens, manager = continuation(voting=voting)
    assert tokens == continuation()[0]
    (failure,) = manager.records["voter"].failures
    assert (failure.hook, "no quorum" in failure.error) == ("apt_decoder", True)


def test_a_decoder_may_leave_single_tokens_to_plain_sampling(continuation):
    class EveryThird:
        def __init__(self):
            self.calls = 0

        def choose(self, input_ids, logits):
            self.calls += 1
            return None if self.calls % 3 else ord("y")

    class Leaves:
        @hookimpl
        def apt_decoder(self):
            return EveryThird()

    tokens, manager = continuation(Leaves())
    assert tokens[2::3] == [ord("y")] * 8
    assert tokens[:2] == continuation()[0][:2]
    assert manager.records["leaves"].failures == []


class Thresholds:
    """Notes the threshold of each generation."""

    def __init__(self):
        self.seen = []

    @hookimpl(priority=0)
    def on_generation_start(self, request, session):
        chosen = Plugin().apt_decoder(request, session)
        self.seen.append(None if chosen is None else chosen.threshold)


def test_the_sample_of_a_run_is_voted_on_by_the_threshold_of_that_moment(caplog):
    caplog.set_level("INFO", "apt.voter")
    thresholds = Thresholds()
    run = tiny_run(
        VOTER,
        thresholds,
        overrides={
            "schedules.vote_threshold": {"start": 9.0, "end": 1.0, "by": "epoch"},
            "model.voting.threshold": 5.0,
            "training.max_epochs": 3,
        },
    )
    assert thresholds.seen == [1.0]
    assert "4 of 4 tokens were put to the vote" in caplog.text
    assert run.manager.records["voter"].failures == []


def test_a_run_that_is_stopped_early_votes_by_the_threshold_of_its_step():
    thresholds = Thresholds()
    ramp = {"start": 9.0, "end": 1.0, "by": "step", "until": 9}
    tiny_run(VOTER, thresholds, steps=5, overrides={"schedules.vote_threshold": ramp})
    assert thresholds.seen == [5.0]


def test_the_profile_alone_gives_the_threshold_where_nothing_is_scheduled():
    thresholds = Thresholds()
    tiny_run(VOTER, thresholds, steps=2, overrides={"model.voting.threshold": 4.5})
    assert thresholds.seen == [4.5]


def test_a_voter_that_waits_for_its_schedule_does_not_vote(caplog):
    caplog.set_level("INFO", "apt.voter")
    tiny_run(VOTER, steps=3, strict=False, overrides={"schedules.enable_voter_at_epoch": 2})
    assert "put to the vote" not in caplog.text


def test_each_generation_votes_by_the_settings_of_its_own_session(caplog):
    caplog.set_level("INFO", "apt.voter")
    request = GenerationRequest("The ", max_new_tokens=3)

    class Within:
        """Generates, in the middle of a generation, by another session."""

        @hookimpl
        def on_generation_start(self):
            generate(tiny_session(VOTER, overrides={"model.voting.threshold": 100.0}), request)

    thresholds = Thresholds()
    scheduled = {"model.voting.threshold": 4.5, "schedules.vote_threshold": 1.0}
    generate(tiny_session(VOTER, Within(), thresholds, overrides=scheduled), request)
    assert thresholds.seen == [1.0]
    assert [record.getMessage() for record in caplog.records if record.name == "apt.voter"] == [
        "0 of 3 tokens were put to the vote",
        "3 of 3 tokens were put to the vote",
    ]


def test_another_profile_read_meanwhile_changes_nothing_of_a_run():
    class Boots:
        @hookimpl
        def on_step_end(self, step):
            booted({"threshold": 7.0})

    thresholds = Thresholds()
    tiny_run(VOTER, Boots(), thresholds, steps=2, overrides={"model.voting.threshold": 4.5})
    assert thresholds.seen == [4.5]


def test_the_weights_are_those_of_a_run_without_it():
    assert tiny_run(VOTER, steps=4).same_weights(tiny_run(steps=4))


@pytest.mark.parametrize(
    ("voting", "schedules", "says"),
    [
        ({"normalized": True}, {}, "model.voting.threshold: .*reaches 2.2"),
        (
            {"normalized": True, "threshold": 0.5},
            {"vote_threshold": {"start": 1.5, "end": 0.5}},
            "schedules.vote_threshold: .*reaches 1.5",
        ),
        (
            {},
            {"vote_threshold": {"start": 1.0, "end": -1.0}},
            "schedules.vote_threshold: .*reaches -1",
        ),
        ({"k": 0}, {}, "model.voting.k"),
        ({"k": 257, "length": 2}, {}, "model.voting.k: .*at most 256 voters"),
        ({"window": 1}, {}, "model.voting.window"),
        ({"winner": "loudest"}, {}, "model.voting.winner"),
    ],
)
def test_bad_settings_are_told_at_the_start(voting, schedules, says):
    with pytest.raises(ConfigError, match=says):
        booted(voting, schedules)


def test_a_scheduled_threshold_takes_the_place_of_the_static_one():
    booted({"normalized": True}, {"vote_threshold": 0.5})


def test_the_plugin_needs_no_torch_before_it_votes():
    code = f"import sys, {VOTER}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
