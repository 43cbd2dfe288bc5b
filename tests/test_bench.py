"""The benchmarks on small input: what they say of themselves. (Speed is for `rmft bench` to print, not for a test.)"""

import pytest

from rmft_jax.bench import run_bench
from rmft_jax.config import load_config
from rmft_jax.errors import UserError


@pytest.mark.slow
def test_detect_measures_both_on_the_same_text():
    pytest.importorskip("presidio_analyzer", reason="needs the extra [presidio]")
    from rmft_jax.bench import detect

    config = load_config(None, ["source.limit=30"])
    result = detect.run(config, rounds=1)
    ((_, ours, peer, patterns),) = result["runs"]
    assert result["ratio"] == ours / peer and result["patterns_ratio"] == ours / patterns
    assert result["shape"]["documents"] == 27 and result["shape"]["spans"] > 60  # a tenth is held out
    assert result["value"] > result["peer_value"] > 0


def test_dedup_measures_both_and_they_agree():
    from rmft_jax.bench import dedup

    result = dedup.run(load_config(None, ["source.limit=120", "tokenizer.vocab_size=600"]), rounds=1)
    ((near, exact, their_near, their_exact),) = result["runs"]
    assert result["ratio"] == pytest.approx((their_near + their_exact) / (near + exact))
    assert result["agreement_pct"] > 95
    assert result["removed_pct"]["ours"] == pytest.approx(result["removed_pct"]["peer"], abs=5)
    assert result["removed_pct"]["ours"] > 1


def test_generate_measures_prefill_and_decoding_apart():
    pytest.importorskip("transformers", reason="needs the extra [bench]")
    from rmft_jax.bench import generate

    small = ["tokenizer.vocab_size=400", "model.layers=1", "model.width=32", "model.heads=2", "mesh.fsdp=4", "mesh.tensor=2"]
    audit = ["audit.prompt_tokens=8", "audit.new_tokens=3", "audit.batch_size=16"]
    result = generate.run(load_config(None, [*small, *audit]), runs=1)
    assert [batch["batch_size"] for batch in result["batches"]] == [8, 16, 32]
    assert all(rate > 0 for batch in result["batches"] for rate in batch["prefill"])
    ((ours, theirs),) = result["runs"]
    assert result["ratio"] == pytest.approx(ours / theirs, rel=0.01)
    assert min(batch["tokens_equal_pct"] for batch in result["batches"]) > 99


TINY = ["out=runs/of_no_demo", "source.limit=60",
        "tokenizer.vocab_size=400", "model.layers=1", "model.width=16", "model.heads=2",
        "training.batch_size=8", "training.sequence_length=32"]  # fmt: skip


def test_train_measures_ours_alone():
    from rmft_jax.bench import train

    result = train.run(load_config(None, TINY), "none", runs=2, seconds=0.01)
    assert result["ratio"] is None and result["peer_value"] is None and len(result["runs"]) == 2
    assert result["value"] == pytest.approx(sum(rate for (rate,) in result["runs"]) / 2, rel=1e-3)
    assert result["peak_bytes"] > 4 * result["parameters"] and result["flops_per_token"] > 6 * 16 * 400


@pytest.mark.slow
def test_train_measures_transformers_beside_it():
    pytest.importorskip("transformers", reason="needs the extra [bench]")
    from rmft_jax.bench import train

    result = train.run(load_config(None, TINY), "transformers", runs=2, seconds=0.1)
    assert "eager" in result["peer_modes"] and result["peer_value"] > 0
    assert result["peer_loss"] == pytest.approx(result["loss"], rel=0.05)  # it sees across documents


def test_dispatch_and_side_by_side_measure_both_ways():
    from rmft_jax.bench import dispatch, side_by_side

    for bench in (dispatch, side_by_side):
        result = bench.run(load_config(None, TINY), runs=1)
        ((ours, peer),) = result["runs"]
        assert result["ratio"] == pytest.approx(peer / ours, rel=0.01) and ours > 0
        assert result["parameters"] == 400 * 16 + 16 + 2 * 16 + 16 * 48 + 16 * 16 + 3 * 16 * 48


def test_bench_prepare_encodes_the_same_text_as_its_peer():
    from rmft_jax.bench import prepare

    result = prepare.run(load_config(None, ["source.limit=60", "tokenizer.vocab_size=400"]), rounds=2)
    assert len(result["runs"]) == 2 and all(ours > 0 < theirs for ours, theirs in result["runs"])
    assert result["shape"]["documents"] == 60 and result["shape"]["tokens"] > result["shape"]["characters"] / 8
    assert result["rss_mib"]["all"] >= result["rss_mib"]["main"] > 50 and result["whole_seconds"] > 0
    with pytest.raises(UserError, match="no peer"):
        prepare.run(load_config(), "spacy")


def test_unknown_benchmarks_and_peers_are_refused():
    with pytest.raises(UserError, match="unknown benchmark 'speed': choose one of masking, tracker, dispatch"):
        run_bench("speed", load_config())
    with pytest.raises(UserError, match="audit.new_tokens 1: all of it is prefill"):
        run_bench("generate", load_config(None, ["audit.new_tokens=1"]))
    with pytest.raises(UserError, match="12 rows do not split over mesh.replica x mesh.fsdp = 8"):
        run_bench("generate", load_config(None, ["audit.batch_size=12"]))
    with pytest.raises(UserError, match="knows no peer 'scrubadub'"):
        run_bench("detect", load_config(), "scrubadub")


def test_knn_measures_all_on_the_same_vectors():
    from rmft_jax.bench import knn

    result = knn.run(load_config(), "scikit-learn", keys=500, queries=24, clusters=8, runs=2)
    searches = result["searches"]
    assert {"exact", "approximate", "scikit-learn"} <= set(searches) and len(result["runs"]) == 2
    assert searches["scikit-learn"]["recall"] > 0.999 and 0.99 <= searches["approximate"]["recall"] <= 1
    assert result["peer_value"] == searches["scikit-learn"]["queries_per_s"] and result["peer"] == "scikit-learn"
    with pytest.raises(UserError, match="bench knn knows no peer 'annoy': choose one of faiss-cpu, scikit-learn"):
        knn.run(load_config(), "annoy")
