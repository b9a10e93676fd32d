"""Who may call, what the dial may be set to, and how much."""

from __future__ import annotations

import math
import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ctrlray.errors import ConfigError
from ctrlray.serve.dial import Dial, Range, check_policy, from_header, to_header
from ctrlray.serve.limits import TICKET_LIFETIME_S, Asked, Bucket, Limits
from ctrlray.serve.policy import Bounds, Key, Policy, PolicyFile, hashed, local_policy, mint
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


def test_two_keys_never_mint_alike_and_the_local_one_works():
    key, policy = local_policy()
    assert policy.find(key).name == "local" and local_policy()[0] != key


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


def test_policy_is_reloaded_and_a_broken_one_leaves_the_last_good_one(tmp_path):
    path = tmp_path / "policy.yaml"

    def write(name: str) -> None:
        path.write_text(yaml.safe_dump({"keys": [{"name": name, "hash": HASH}]}))

    write("first")
    file = PolicyFile(path, lambda policy: check_policy(policy, {"tiny": DIAL}))
    assert file.policy.find("ck-one").name == "first"
    write("second-name")
    assert file.policy.find("ck-one").name == "second-name" and not file.problem
    path.write_text("keys: [")
    assert file.policy.find("ck-one").name == "second-name" and "policy file" in file.problem
    path.unlink()
    assert file.policy.find("ck-one").name == "second-name" and file.problem
    write("third")
    assert file.policy.find("ck-one").name == "third" and not file.problem


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


def test_a_request_whose_ingress_died_is_forgotten():
    limits = Limits({"m": 1})
    assert limits.admit(Asked("a", key(), "m", 1), 0.0) is None
    assert limits.admit(Asked("b", key(), "m", 1), TICKET_LIFETIME_S) is not None
    assert limits.admit(Asked("c", key(), "m", 1), TICKET_LIFETIME_S + 1) is None


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
