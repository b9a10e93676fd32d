"""Who may call, what the dial may be set to, and how much."""

from __future__ import annotations

import hmac
import math
import os
import pickle
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ctrlray.errors import ConfigError
from ctrlray.serve import policy as policy_module
from ctrlray.serve.dial import Dial, Range, check_policy, from_header, to_header
from ctrlray.serve.limits import UNSEEN_S, WITHDRAWN_S, Asked, Bucket, Faults, Limits
from ctrlray.serve.policy import AGAIN_S, SETTLED_S, Bounds, Key, Policy, PolicyFile, hashed, local_policy, mint
from ctrlray.serve.refusal import Refusal

DIAL = Dial((Range("safety", 5, 1, 5, 5), Range("helpfulness", 3, 2, 3, 3)))
HASH = hashed("ck-one")


def settle(asked, bounds=None, clamp=False):
    return DIAL.settle(asked, bounds or {}, clamp)


def refused(asked, bounds=None, clamp=False) -> Refusal:
    with pytest.raises(Refusal) as caught:
        settle(asked, bounds, clamp)
    return caught.value


def test_missing_and_null_levels_take_the_default_of_the_key_then_of_the_model():
    assert settle({}).levels == (5, 3)
    assert settle({"safety": None}, {"safety": Bounds(default=4)}).levels == (4, 3)
    assert settle({}, {"safety": Bounds(high=3)}).levels == (3, 3)  # the model's default, moved inside


@pytest.mark.parametrize("wanted, level", [(2, 2), (2.4, 2), (2.5, 3), (3.49, 3), (4.5, 5), (0.5, 1), (5.49, 5)])
def test_halves_round_up(wanted, level):
    assert settle({"safety": wanted}).levels[0] == level


@pytest.mark.parametrize("wanted", [0, 0.49, 5.5, -1, 1e300, math.inf, math.nan])
def test_a_level_that_the_model_lacks_is_400_even_where_bounds_clamp(wanted):
    found = refused({"safety": wanted}, {"safety": Bounds(low=2, high=3)}, clamp=True)
    assert found.status == 400 and found.field == "control.safety" and "1..5" in found.message


def test_a_level_that_the_export_forbids_is_400():
    assert "2..3" in refused({"helpfulness": 1}).message


def test_unknown_attribute_names_those_there_are():
    found = refused({"kindness": 1})
    assert found.status == 400 and found.field == "control.kindness" and "['safety', 'helpfulness']" in found.message


def test_out_of_bounds_is_403_naming_the_bound_or_clamped():
    bounds = {"safety": Bounds(low=2, high=4)}
    found = refused({"safety": 1}, bounds)
    assert (found.status, found.code) == (403, "control_out_of_bounds") and "2..4" in found.message
    assert settle({"safety": 1}, bounds, clamp=True) == ((2, 3), ("safety",))
    assert settle({"safety": 5}, bounds, clamp=True) == ((4, 3), ("safety",))


@given(
    st.dictionaries(st.sampled_from(["safety", "helpfulness"]), st.floats(-20, 20)),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
)
def test_nothing_in_force_lies_outside_of_the_bounds(asked, low, high, clamp):
    low, high = sorted((low, high))
    try:
        levels, clamped = settle(asked, {"safety": Bounds(low=low, high=high)}, clamp)
    except Refusal as refusal:
        assert refusal.status in (400, 403)
        return
    assert low <= levels[0] <= high and 2 <= levels[1] <= 3
    assert clamp or not clamped


def test_headers_round_trip():
    assert from_header("safety=5, helpfulness=2.4") == {"safety": 5.0, "helpfulness": 2.4}
    assert from_header(to_header({"safety": 5})) == {"safety": 5.0}
    assert from_header("") == {}


@pytest.mark.parametrize(
    "text", ["safety", "safety=", "safety=high", "safety=1e9", "safety=1,safety=2", "safety=1;x=2", "Safety=1"]
)
def test_headers_that_are_not_settings(text):
    with pytest.raises(Refusal, match="write it as"):
        from_header(text)


def test_keys_are_found_by_hash_alone():
    key, digest = mint()
    policy = Policy(keys=(Key(name="a", hash=HASH), Key(name="b", hash=digest)))
    assert policy.find(key).name == "b" and policy.find("ck-one").name == "a"
    assert policy.find(key[:-1]) is None and policy.find("") is None and policy.find(digest) is None
    assert len(key) > 43 and key not in policy.model_dump_json()


def test_finding_a_key_takes_as_many_comparisons_for_a_hit_as_for_a_miss(monkeypatch):
    """All of them in constant time: neither the number of keys before it nor a common beginning of two hashes shows."""
    compared = []

    def compare(one, two):
        compared.append((one, two))
        return real(one, two)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    policy = Policy(keys=tuple(Key(name=f"k{i}", hash=hashed(f"ck-{i}")) for i in range(5)))
    counts = []
    for presented in ("ck-0", "ck-4", "ck-none", ""):
        compared.clear()
        policy.find(presented)
        assert {two for _, two in compared} == {hashed(presented)}
        counts.append(len(compared))
    assert counts == [5, 5, 5, 5]


def test_two_keys_never_mint_alike_and_the_local_one_works():
    key, policy = local_policy()
    assert policy.find(key).name == "local" and local_policy()[0] != key
    assert policy.find(key).metrics  # whoever started the server is its operator


@pytest.mark.parametrize(
    "keys, message",
    [
        ([], "at least 1 item"),
        ([{"name": "a", "hash": "secret"}], "keys.0.hash"),
        ([{"name": "a", "hash": HASH, "key": "ck-one"}], "keys.0.key: unknown key"),
        ([{"name": "a", "hash": HASH}, {"name": "b", "hash": HASH}], "two keys have the hash"),
        ([{"name": "a", "hash": HASH, "requests_per_minute": 0}], "requests_per_minute"),
    ],
)
def test_policy_files_that_do_not_load(tmp_path, keys, message):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"keys": keys}))
    with pytest.raises(ConfigError, match=message):
        PolicyFile(path)


def test_missing_policy_file_is_called_one(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the policy file"):
        PolicyFile(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "key, message",
    [
        ({"models": ["other"]}, "models has 'other'; served are"),
        ({"attributes": {"kindness": {}}}, "attributes has 'kindness'"),
        ({"attributes": {"helpfulness": {"high": 1}}}, "leaves no level of the model's 2..3"),
        ({"attributes": {"safety": {"high": 3, "default": 4}}}, "default=4 must lie in 1..3"),
    ],
)
def test_policies_that_do_not_fit_the_models(key, message):
    policy = Policy(keys=(Key.model_validate({"name": "a", "hash": HASH} | key),))
    with pytest.raises(ConfigError, match=message):
        check_policy(policy, {"tiny": DIAL})


class Watched:
    """A policy file, what it said to the operator, and a clock that stands still."""

    def __init__(self, path):
        self.path, self.now_s, self.said = path, 1e9, []
        self.write("first")
        self.file = PolicyFile(path, lambda policy: check_policy(policy, {"tiny": DIAL}), self.said.append, lambda: self.now_s)

    def write(self, name: str) -> None:
        self.put(yaml.safe_dump({"keys": [{"name": name, "hash": HASH}]}))

    def put(self, text: str, ahead_s: float = 0.0) -> None:
        """Write it now; by the file's own time so much later."""
        self.path.write_text(text)
        os.utime(self.path, (self.now_s + ahead_s, self.now_s + ahead_s))

    def later(self, seconds: float) -> str:
        """Whose key it is after so long, by what is asked then."""
        self.now_s += seconds
        return self.file.policy.find("ck-one").name


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path / "policy.yaml")


def test_policy_is_reloaded_and_a_broken_one_leaves_the_last_good_one(watched):
    assert watched.later(0) == "first"
    watched.write("second-name")
    assert watched.later(0) == "first" and watched.later(SETTLED_S) == "second-name" and not watched.file.problem
    watched.put("keys: [")
    watched.later(0)
    assert watched.later(SETTLED_S) == "second-name" and "policy file" in watched.file.problem
    watched.path.unlink()
    watched.later(0)
    assert watched.later(SETTLED_S) == "second-name" and watched.file.problem
    watched.write("third")
    watched.later(0)
    assert watched.later(SETTLED_S) == "third" and not watched.file.problem


def test_a_policy_that_could_not_be_read_is_taken_when_it_can_be(watched, monkeypatch):
    """Rights that are mended change neither content nor its time; storage that comes back changes nothing at all."""
    reads = policy_module.read_policy
    watched.write("second")
    monkeypatch.setattr(policy_module, "read_policy", failing)
    watched.later(0)
    assert watched.later(SETTLED_S) == "first" and "PermissionError" in watched.file.problem
    assert watched.later(AGAIN_S) == "first" and len(watched.said) == 1
    monkeypatch.setattr(policy_module, "read_policy", reads)
    assert watched.later(1.0) == "first"
    before = watched.path.stat().st_ctime_ns
    while watched.path.stat().st_ctime_ns == before:  # a file system may count time in coarse steps
        watched.path.chmod(0o600)
    assert watched.later(0) == "second" and not watched.file.problem
    watched.write("third")
    monkeypatch.setattr(policy_module, "read_policy", failing)
    watched.later(0)
    assert watched.later(SETTLED_S) == "second"
    monkeypatch.setattr(policy_module, "read_policy", reads)
    assert watched.later(AGAIN_S - 1) == "second" and watched.later(1.0) == "third"


def test_one_that_is_not_in_force_is_no_more_read_while_it_is_written_than_another(watched):
    watched.put("keys: [")
    watched.later(0)
    assert watched.later(SETTLED_S) == "first" and watched.file.problem
    watched.now_s += 2 * AGAIN_S
    watched.write("half")
    assert watched.later(0) == "first" and watched.later(SETTLED_S) == "half"


def failing(path):
    raise PermissionError(path)


@pytest.mark.parametrize(
    "text",
    [
        "keys: {{ keys }}",  # a template that nobody filled in
        "? [a, b]\n: 1",
        "keys: [{name: a, hash: 2024-99-99}]",
        "keys: [{name: a, hash: !!timestamp x}]",
        "keys: [{name: a, hash: !!int ''}]",
        "keys: !!map [a]",
        'keys: "\\UFFFFFFFF"',
        "keys: " + "[" * 3000,
        "keys: &keys [*keys]",  # a list in itself
        "keys: {2024-01-01: 1}",
    ],
)
def test_whatever_is_in_a_broken_policy_file_the_last_good_one_stays_in_force(watched, text):
    watched.put(text)
    watched.later(0)
    for _ in range(2):
        assert watched.later(SETTLED_S) == "first" and str(watched.path) in watched.file.problem
    assert len(watched.said) == 1 and "the policy of before stays" in watched.said[0]
    with pytest.raises(ConfigError, match=re.escape(str(watched.path))):
        PolicyFile(watched.path)
    watched.write("second")
    watched.later(0)
    assert watched.later(SETTLED_S) == "second" and not watched.file.problem


def test_a_policy_that_cannot_even_be_checked_leaves_the_last_good_one_in_force(tmp_path):
    checked, said = [], []

    def check(policy):
        checked.append(policy)
        if len(checked) > 1:
            raise KeyError

    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"keys": [{"name": "a", "hash": HASH}]}))
    file = PolicyFile(path, check, said.append)
    path.write_text(yaml.safe_dump({"keys": [{"name": "other", "hash": HASH}]}))
    os.utime(path, (1.0, 1.0))
    assert file.policy.find("ck-one").name == "a" and "KeyError" in file.problem and len(said) == 1


def test_a_policy_file_that_is_being_written_is_not_read(watched):
    """A good beginning of the file is a policy too: one without the keys that come later."""
    for step in range(5):
        watched.write(f"half-{'x' * step}")
        assert watched.later(SETTLED_S * 0.8) == "first"  # it has just changed
    assert watched.later(SETTLED_S) == "half-xxxx" and not watched.said


def test_a_policy_file_that_was_written_long_before_the_next_request_is_read_at_once(watched):
    watched.write("second")
    assert watched.later(60) == "second"


def test_a_policy_file_whose_clock_is_ahead_is_read_all_the_same(watched):
    watched.put(watched.path.read_text().replace("first", "second"), ahead_s=3600)
    assert watched.later(0) == "first" and watched.later(SETTLED_S) == "second"


def test_the_operator_is_told_of_a_broken_policy_file_once_and_when_it_is_good_again(watched):
    watched.put("keys: [")
    watched.later(0)
    for _ in range(3):
        watched.later(SETTLED_S)
    (said,) = watched.said
    assert "the policy of before stays" in said and str(watched.path) in said
    watched.write("second")
    watched.later(0)
    watched.later(SETTLED_S)
    assert len(watched.said) == 2 and "in force again" in watched.said[1]


def test_a_broken_policy_file_is_a_warning_of_the_log(tmp_path, caplog):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"keys": [{"name": "a", "hash": HASH}]}))
    file = PolicyFile(path)
    path.write_text("keys: [")
    os.utime(path, (1.0, 1.0))
    assert file.policy.find("ck-one").name == "a"
    (record,) = [r for r in caplog.records if r.name == "ctrlray.serve.policy"]
    assert record.levelname == "WARNING" and "the policy of before stays" in record.getMessage()


def key(**limits) -> Key:
    return Key.model_validate({"name": "web", "hash": HASH} | limits)


def test_bucket_by_hand():
    bucket = Bucket(60, 60.0, 0.0)
    assert bucket.wait_s(60, 0.0) == 0 and bucket.wait_s(61, 0.0) == math.inf
    bucket.take(60)
    assert bucket.wait_s(10, 0.0) == 10 and bucket.wait_s(10, 4.0) == 6 and bucket.wait_s(10, 10.0) == 0
    bucket.take(-100)  # never more than a minute's worth
    assert bucket.level == 60


def test_requests_per_minute():
    limits = Limits({"m": 99})
    web = key(requests_per_minute=2)
    assert [limits.admit(Asked(str(i), web, "m", 5), 0.0) for i in range(2)] == [None, None]
    wait = limits.admit(Asked("2", web, "m", 5), 0.0)
    assert wait.retry_after_s == 30 and "requests_per_minute=2" in wait.message
    assert limits.admit(Asked("3", web, "m", 5), 30.0) is None


def test_tokens_are_held_and_the_rest_given_back():
    limits = Limits({"m": 99})
    web = key(tokens_per_minute=100)
    assert limits.admit(Asked("a", web, "m", 80), 0.0) is None
    assert limits.admit(Asked("b", web, "m", 80), 0.0).retry_after_s == 36  # 60 lacking at 100 a minute
    limits.settle("a", 20, 0.0)
    assert limits.admit(Asked("c", web, "m", 80), 0.0) is None
    assert limits.admit(Asked("d", web, "m", 101), 0.0).retry_after_s == 0  # never


def test_limits_that_change_to_and_fro_let_no_more_through():
    """Two ingress replicas, one with the old policy and one with the new: 40 tokens a minute are not 40 for each change."""
    limits = Limits({"m": 99})
    old, new = key(tokens_per_minute=40, requests_per_minute=4), key(tokens_per_minute=60, requests_per_minute=6)
    taken = [limits.admit(Asked(str(i), (old, new)[i % 2], "m", 15), 0.0) is None for i in range(20)]
    assert sum(taken) == 2  # 40 - 15 - 15 = 10 are left, whichever policy asks
    wait = limits.admit(Asked("a", new, "m", 40), 0.0)
    assert wait.retry_after_s == 30 and "tokens_per_minute=60" in wait.message  # 30 lacking at 60 a minute
    assert limits.admit(Asked("b", new, "m", 40), 30.0) is None  # it fills at the new rate


def test_a_lower_limit_binds_at_once_and_a_higher_one_fills_with_time():
    bucket = Bucket(60, 60.0, 0.0)
    bucket.resize(30, 0.0)
    assert bucket.level == 30
    bucket.take(10)
    bucket.resize(600, 30.0)  # half a minute at 30 a minute: full at 30
    assert bucket.level == 30 and bucket.wait_s(40, 30.0) == 1  # 10 lacking at 600 a minute


def test_a_request_that_ends_after_a_change_gives_back_what_it_held_and_no_more():
    limits = Limits({"m": 99})
    old, new = key(tokens_per_minute=100), key(tokens_per_minute=1000)
    assert limits.admit(Asked("a", old, "m", 90), 0.0) is None
    assert limits.admit(Asked("b", new, "m", 10), 0.0) is None
    limits.settle("a", 40, 0.0)  # 100 - 90 - 10 + 50
    assert limits.admit(Asked("c", new, "m", 51), 0.0) is not None
    assert limits.admit(Asked("d", new, "m", 50), 0.0) is None
    assert limits.admit(Asked("e", old, "m", 50), 3.0) is None  # 0 + 3 s at 1000 a minute
    assert limits.admit(Asked("f", new, "m", 1), 63.0) is None
    assert limits.admit(Asked("g", new, "m", 900), 123.0) is None  # full at 1000: 100 are left
    limits.settle("e", 40, 123.0)  # 110, and not the 100 of the old limit
    assert limits.admit(Asked("h", new, "m", 110), 123.0) is None


def test_a_request_from_before_there_was_a_limit_gives_back_nothing():
    limits = Limits({"m": 99})
    assert limits.admit(Asked("a", key(), "m", 1000), 0.0) is None
    assert limits.admit(Asked("b", key(tokens_per_minute=50), "m", 50), 0.0) is None
    limits.settle("a", 10, 0.0)
    assert limits.admit(Asked("c", key(tokens_per_minute=50), "m", 1), 0.0) is not None


def test_refused_requests_are_as_many_as_the_key_may_send():
    faults, web = Faults(), key(requests_per_minute=2)
    faults.count(web, 0.0)
    assert faults.check(web, 0.0) is None
    faults.count(web, 0.0)
    wait = faults.check(web, 0.0)
    assert wait.retry_after_s == 30 and "requests_per_minute=2" in wait.message
    assert faults.check(web, 30.0) is None and faults.check(key(name="other", requests_per_minute=2), 0.0) is None
    for _ in range(9):
        faults.count(key(name="free"), 0.0)
    assert faults.check(key(name="free"), 0.0) is None


def test_many_faults_at_once_make_the_wait_no_longer():
    faults, web = Faults(), key(requests_per_minute=2)
    for _ in range(50):  # of requests that were all here before the first was refused
        faults.count(web, 0.0)
    assert faults.check(web, 0.0).retry_after_s == 30
    faults.count(web, 15.0)
    assert faults.check(web, 15.0).retry_after_s == 30 and faults.check(web, 45.0) is None


def test_the_key_s_own_limits_are_named_before_a_full_queue():
    limits, web = Limits({"m": 1}), key(requests_per_minute=1)
    assert limits.admit(Asked("a", web, "m", 1), 0.0) is None
    waits = [limits.admit(Asked("b", k, "m", 1), 0.0) for k in (web, key(name="other"))]
    assert [(w.of_key, "queue" in w.message) for w in waits] == [(True, False), (False, True)]


def test_a_refused_request_takes_nothing():
    limits = Limits({"m": 99})
    web = key(requests_per_minute=1, tokens_per_minute=10)
    assert limits.admit(Asked("a", web, "m", 11), 0.0) is not None
    assert limits.admit(Asked("b", web, "m", 10), 0.0) is None


def test_concurrent_and_queue():
    limits = Limits({"m": 3, "n": 3})
    web, other = key(concurrent=2), key(name="other")
    assert limits.admit(Asked("a", web, "m", 1), 0.0) is None and limits.admit(Asked("b", web, "m", 1), 0.0) is None
    assert "concurrent=2" in limits.admit(Asked("c", web, "n", 1), 0.0).message
    assert limits.admit(Asked("d", other, "m", 1), 0.0) is None
    wait = limits.admit(Asked("e", other, "m", 1), 0.0)
    assert "queue of 'm' is full (3 requests)" in wait.message and wait.retry_after_s == 5
    limits.settle("a", 1, 2.5)
    limits.settle("a", 1, 2.5)  # once only
    assert limits.in_flight("m") == 2
    assert limits.admit(Asked("f", other, "m", 1), 2.5) is None
    assert limits.admit(Asked("g", other, "m", 1), 2.5).retry_after_s == 3  # 2.5 s is what one took


def test_a_request_whose_ingress_died_is_forgotten_and_one_that_is_renewed_is_not():
    limits = Limits({"m": 2}, UNSEEN_S)
    for ticket in ("dead", "alive"):
        assert limits.admit(Asked(ticket, key(), "m", 1), 0.0) is None
    limits.renew(["alive", "unknown"], 50.0)
    assert limits.admit(Asked("b", key(), "m", 1), UNSEEN_S) is not None
    assert limits.admit(Asked("c", key(), "m", 1), UNSEEN_S + 1) is None
    assert limits.admit(Asked("d", key(), "m", 1), UNSEEN_S + 50) is not None
    assert limits.admit(Asked("e", key(), "m", 1), UNSEEN_S + 51) is None


def test_a_long_answer_keeps_its_place_where_ingress_and_desk_are_one():
    limits = Limits({"m": 1})
    assert limits.admit(Asked("a", key(), "m", 1), 0.0) is None
    assert limits.admit(Asked("b", key(), "m", 1), 1e6) is not None


def test_a_withdrawn_request_frees_its_place_and_takes_no_tokens():
    limits, web = Limits({"m": 1}), key(tokens_per_minute=100, requests_per_minute=3)
    assert limits.admit(Asked("a", web, "m", 100), 0.0) is None
    limits.withdraw("a", 3.0)
    assert limits.in_flight() == 0 and limits.admit(Asked("b", web, "m", 100), 3.0) is None
    limits.withdraw("b", 3.0)
    assert limits.admit(Asked("c", key(name="other"), "m", 1), 3.0) is None
    assert limits.admit(Asked("d", key(name="other"), "m", 1), 3.0).retry_after_s == 5  # it tells nothing of how long one takes
    limits.settle("c", 1, 3.0)
    assert limits.admit(Asked("e", web, "m", 1), 3.0) is None
    limits.withdraw("e", 3.0)
    assert "requests_per_minute" in limits.admit(Asked("f", web, "m", 1), 3.0).message  # as one whose caller leaves counts


def test_a_request_that_was_withdrawn_before_it_came_in_is_refused(monkeypatch):
    limits = Limits({"m": 9})
    limits.withdraw("a", 0.0)
    assert "withdrawn" in limits.admit(Asked("a", key(), "m", 1), WITHDRAWN_S).message and limits.in_flight() == 0
    limits.withdraw("b", 0.0)
    assert limits.admit(Asked("b", key(), "m", 1), WITHDRAWN_S + 1) is None
    monkeypatch.setattr("ctrlray.serve.limits._MOST_WITHDRAWN", 3)
    for i in range(9):
        limits.withdraw(str(i), 100.0)
    assert [*limits._withdrawn] == ["6", "7", "8"]
    limits.withdraw("c", 101.0 + WITHDRAWN_S)
    assert [*limits._withdrawn] == ["c"]


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 40), st.integers(0, 40)), max_size=40))
def test_no_minute_lets_more_than_two_buckets_through(steps):
    """A full bucket at once and its refill within the minute: at most twice the limit in any 60 s."""
    limits, now, taken = Limits({"m": 999}), 0.0, []
    web = key(tokens_per_minute=40)
    for i, (pause, tokens, used) in enumerate(steps):
        now += pause
        if limits.admit(Asked(str(i), web, "m", tokens), now) is None:
            limits.settle(str(i), min(used, tokens), now)
            taken.append((now, min(used, tokens)))
    for start, _ in taken:
        assert sum(t for at, t in taken if start <= at <= start + 60) <= 80 + 1e-6


def test_refusals_pickle():
    there = pickle.loads(pickle.dumps(Refusal(429, "later", "model", "busy", 3)))
    assert there.body() == Refusal(429, "later", "model", "busy").body() and there.headers() == {"Retry-After": "3"}
