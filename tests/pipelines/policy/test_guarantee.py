"""A guarantee holds as often as it says, and nowhere it was not shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli.main import main
from pipelines.exports.card import data_card
from pipelines.labels.decide import decide_run
from pipelines.policy.betting import DrawnStratum, log_capital
from pipelines.policy.guarantee import ALL, Asked, accepted_counts, guarantee_run
from pipelines.policy.policy import Decision, Policy
from pipelines.policy.sequence import GRID
from pipelines.routing.route import route_run
from pipelines.truth.audit_images import audit_images
from storage.errors import ConfigError
from storage.labels.versions import read_version
from storage.review.answers import append_answers
from storage.review.queue import read_queue
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.pipelines.policy.test_fit import answer, coco, some_run
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import boxes, make_run, tar_shard


def sizes(accepted: np.ndarray) -> np.ndarray:
    return np.bincount(accepted)


def test_a_false_statement_passes_in_at_most_one_audit_of_ten() -> None:
    """Populations that are just not right often enough: errors spread, or whole images wrong."""
    rng = np.random.default_rng(0)
    accepted = rng.poisson(5, 600)
    spread = rng.binomial(accepted, 0.1)
    spread += (rng.permutation(600) < 1 + max(0, int(0.1 * accepted.sum()) - spread.sum())) * (
        spread < accepted
    )
    whole = np.where(np.cumsum(accepted) <= 0.1 * accepted.sum() + 10, accepted, 0)
    for wrong in (spread, whole):
        assert wrong.sum() >= 0.1 * accepted.sum()
        passed = 0
        for _ in range(400):
            at = rng.permutation(600)[:200]
            drawn = [DrawnStratum(sizes(accepted), wrong[at])]
            passed += log_capital(drawn, 0.9) >= np.log(10)
        assert passed <= 0.1 * 400 + 2.5 * np.sqrt(400 * 0.09)


def test_two_strata_are_judged_at_the_worst_allocation() -> None:
    """All errors may lie where hardly anybody looked; equal shares cost nothing."""
    size = np.array([0] * 5 + [400])  # 400 images of five boxes
    clean = np.zeros(100, np.int64)
    one = log_capital([DrawnStratum(2 * size, np.zeros(200, np.int64))], 0.9)
    two = log_capital([DrawnStratum(size, clean), DrawnStratum(size, clean)], 0.9)
    uneven = log_capital([DrawnStratum(size, clean[:10]), DrawnStratum(size, clean)], 0.9)
    assert two == pytest.approx(one, rel=0.25)
    assert uneven < 0.3 * two
    # Everything seen: then it is known, and no longer a bet.
    assert log_capital([DrawnStratum(size, np.zeros(400, np.int64))], 0.9) > np.log(1e6)
    assert log_capital([DrawnStratum(size, np.ones(400, np.int64))], 0.9) < np.log(10)


def test_accepted_boxes_are_counted_from_each_threshold_on() -> None:
    scores = np.array([0.98, 0.7, 0.7, 0.69, 0.01], np.float32)
    counts = accepted_counts(scores, np.array([0, 0, 1, 1, 1]), 2)
    at = {float(t): counts[g].tolist() for g, t in enumerate(GRID)}
    assert at[0.98] == [1, 0]
    assert at[0.7] == [2, 1]
    assert at[0.68] == [2, 2]
    assert at[0.06] == [2, 2]


def audited_run(n: int = 120) -> tuple[Manifest, Policy]:
    """A run whose images were all drawn; boxes of score 0.5 and more are right."""
    manifest, true = some_run(None, n)
    route_run(manifest, budget=f"{n} images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(manifest.store))
    append_answers(manifest.store, [answer(i, true[i.image_id], "RBC") for i in items[: n // 2]])
    return manifest, Policy(accept=0.9, reject=0.1)


def test_the_audit_shows_a_threshold_and_the_policy_carries_it() -> None:
    manifest, policy = audited_run()
    drawn = audit_images(manifest)["one"]
    assert len(drawn) == 60
    found = guarantee_run(manifest, policy, Asked(0.9))
    assert found.guarantee is not None
    least = found.guarantee.thresholds[ALL]
    assert 0.4 < least <= 0.6  # from 0.5 on all are right, from 0.45 on nine of ten
    assert (found.guarantee.images, found.guarantee.audited) == (120, 60)
    assert [p.name for p in found.classes if p.threshold is not None] == ["RBC"]
    categories = manifest.record.identity.categories
    decided = found.policy.thresholds(categories).decide(
        np.array([least, least - 0.01], np.float32), np.zeros(2, np.int16)
    )
    assert decided[0] == Decision.ACCEPT
    assert decided[1] < Decision.ACCEPT
    assert Policy.from_yaml(found.policy.to_yaml().encode(), where="x") == found.policy
    lineage = decide_run(manifest, found.policy)
    said = read_version(manifest.store).guarantee
    assert said == lineage.guarantee
    assert "At least 90% of all accepted boxes" in said
    assert "90% confidence, over the 120 images" in said
    assert f"## Guarantee\n\n{said}\n" in data_card(lineage, "coco", "", {}, {})


def test_a_guarantee_is_void_elsewhere_and_decide_says_so() -> None:
    manifest, policy = audited_run()
    found = guarantee_run(manifest, policy, Asked(0.9)).policy
    by_hand = decide_run(manifest, found.with_thresholds(0.3, None)).guarantee
    assert by_hand == "The guarantee of 90% is void: --accept was given by hand."
    identity = replace(manifest.record.identity, model_sha256="f" * 64)
    with pytest.raises(ConfigError, match="its guarantee is void"):
        found.for_run(identity)
    other = Manifest(manifest.store, replace(manifest.record, identity=identity))
    freed = found.model_copy(update={"model_sha256": None})
    assert "is void: it was shown for model" in decide_run(other, freed).guarantee


def test_too_little_is_said_with_how_much_more_would_do() -> None:
    manifest, true = some_run(None, 400)
    route_run(manifest, budget="400 images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(manifest.store))
    append_answers(manifest.store, [answer(i, true[i.image_id], "RBC") for i in items[:12]])
    few = guarantee_run(manifest, Policy(), Asked(0.95))
    assert few.guarantee is None
    assert few.policy == Policy()
    assert few.all.more is not None
    assert 20 < few.all.more < 388
    more = [answer(i, true[i.image_id], "RBC") for i in items[12 : 12 + few.all.more]]
    append_answers(manifest.store, more)
    assert guarantee_run(manifest, Policy(), Asked(0.95)).guarantee is not None


def test_a_skipped_image_counts_as_wrong_and_an_open_one_ends_the_draw() -> None:
    shard = tar_shard("a.tar")
    found = boxes([[10.0, 10.0, 70.0, 70.0]], [0.9], [0])
    rows = [distinct_row(f"a.tar/{i}.jpg", shard, found) for i in range(30)]
    manifest = make_run(MemoryStore(), {shard: rows})
    route_run(manifest, budget="30 images", policy=Policy(), invocation="one", audit=1.0)
    ranked = sorted(read_queue(manifest.store), key=lambda item: item.audit_rank)
    given = [answer(i, [[10.0, 10.0, 70.0, 70.0]], "RBC") for i in ranked]
    given[3] = replace(given[3], skipped=True, boxes=())
    append_answers(manifest.store, [*given[:10], *given[11:]])
    drawn = audit_images(manifest)["one"]
    assert [bool(image.right.all()) for image in drawn] == [True] * 3 + [False] + [True] * 6


def test_the_command_writes_it_and_leaves_with_3_where_nothing_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _, true = some_run(str(run), 100)
    truth = coco(tmp_path, true)

    def call(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main([*arguments])
        assert left.value.code == code
        return capsys.readouterr().out

    said = call("fit", str(run), "--truth", truth, "--guarantee", "0.9", "--json")
    fields = json.loads(said.splitlines()[-1])
    assert (
        "assumes that the images with ground truth are a random sample"
        in (fields["guarantee"]["sentence"])
    )
    assert Policy.load(str(run / "policy.yaml")).guarantee is not None
    assert "At least 90% of all accepted boxes" in " ".join(call("decide", str(run)).split())
    call("fit", str(run), "--truth", truth, "--guarantee", "1.5", code=2)


def test_a_policy_fitted_on_fp32_is_not_taken_for_int8_silently() -> None:
    manifest, _ = some_run(None)
    identity = manifest.record.identity
    fitted = Policy(precision="fp32")
    assert fitted.for_run(replace(identity, precision="bf16")).accept[0] == np.float32(0.7)
    with pytest.raises(ConfigError, match="fitted on fp32 scores, the run's are int8"):
        fitted.for_run(replace(identity, precision="int8"))
    with pytest.raises(ConfigError, match="fitted on int8"):
        Policy(precision="int8").for_run(replace(identity, precision="fp32"))
    assert Policy().for_run(replace(identity, precision="int8")).accept[0] == np.float32(0.7)
