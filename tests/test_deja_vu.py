"""Deja vu memorization: the definitions against plain loops, the dual encoder, caption masking, the study, the audit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sklearn.metrics import precision_recall_fscore_support
from sklearn.neighbors import NearestNeighbors

from rmft_jax.config import load_config
from rmft_jax.data.captions import glyph_world, load_captions, tokenize_captions
from rmft_jax.errors import UserError
from rmft_jax.kernels import (
    Rule,
    aucg,
    contrastive_loss,
    mask_batch,
    neighbour_objects,
    object_scores,
    population_gap,
    recall_survival,
    sample_gaps,
)
from rmft_jax.memorization.deja_vu import audit_vlm, predict, retrieval_recall, sample_level
from rmft_jax.models.dual_encoder import KINDS, encode_images, encode_texts, init_dual_encoder
from rmft_jax.report.html import claims_table, render, text_table
from rmft_jax.studies import run_study
from rmft_jax.study_config import CaptionedSetConfig, DejaVuArmConfig, DualEncoderConfig
from rmft_jax.training.dual_encoders import caption_bank, caption_batch, train_dual_encoders

RNG = np.random.default_rng(0)


def test_scores_are_those_of_scikit_learn():
    there, public = RNG.random((40, 12)) < 0.3, RNG.random((25, 12)) < 0.1
    indices = np.stack([RNG.choice(25, 3, replace=False) for _ in range(40)])
    indices[0] = -1
    said = neighbour_objects(public, indices)
    union = np.array([public[row[row >= 0]].any(0) for row in indices])
    np.testing.assert_array_equal(said, union)
    scores = object_scores(there, said)
    for n in range(40):
        precision, recall, f, _ = precision_recall_fscore_support(there[n], union[n], average="binary", zero_division=0)
        np.testing.assert_allclose([scores.precision[n], scores.recall[n], scores.f[n]], [precision, recall, f], rtol=1e-6)


def test_gaps_count_wins_and_losses_and_drop_records_without_objects():
    a, b = np.float32([1, 0.5, 0.2, 0.9, 0.3]), np.float32([0, 0.5, 0.4, 0.1, 0.9])
    where = np.array([True, True, True, True, False])
    assert population_gap(a, b, where) == pytest.approx((2 - 1) / 4)
    assert population_gap(a, a, where) == 0 and aucg(a, a, where) == 0
    assert population_gap(b, a, where) == -population_gap(a, b, where)


def test_aucg_is_the_difference_of_means_and_the_published_sum_comes_to_it():
    a, b, where = RNG.random(500).astype(np.float32), (RNG.random(500) ** 2).astype(np.float32), RNG.random(500) < 0.9
    exact = a[where].mean() - b[where].mean()
    assert aucg(a, b, where) == pytest.approx(exact, abs=1e-6)
    at = np.linspace(0, 1, 20_001)
    area = np.trapezoid(recall_survival(a, where, at) - recall_survival(b, where, at), at)
    assert area == pytest.approx(exact, abs=1e-4)
    assert aucg(a, b, where, bins=100) == pytest.approx(exact, abs=5e-3)


def test_sample_level_takes_the_first_in_order():
    target, reference, where = RNG.random(50), RNG.random(50), RNG.random(50) < 0.8
    order = RNG.random(50)
    first = [n for n in np.argsort(order) if where[n]][:7]
    expected = np.mean((target - reference)[first])
    assert sample_gaps(order, target, reference, where, 7) == pytest.approx(expected, abs=1e-6)


def test_the_sharded_loss_and_its_gradient_are_those_of_one_device():
    image, text = (jnp.asarray(RNG.normal(size=(32, 6)), jnp.float32) for _ in range(2))
    scale = jnp.float32(3)
    logits = np.float64(3) * np.asarray(image, float) @ np.asarray(text, float).T
    log_share = lambda x: x - np.log(np.exp(x).sum(1, keepdims=True))  # noqa: E731
    plain = -0.5 * np.mean(np.diag(log_share(logits)) + np.diag(log_share(logits.T)))
    assert contrastive_loss(image, text, scale) == pytest.approx(plain, rel=1e-5)

    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(w, image, text, axis_name=None):
        return contrastive_loss(image @ w, text, scale, axis_name=axis_name)

    def of_device(w, image, text):
        return jax.lax.pmean(jax.value_and_grad(loss)(w, image, text, "rows"), "rows")

    w = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)
    specs = {"in_specs": (P(), P("rows"), P("rows")), "out_specs": P()}
    sharded = jax.jit(jax.shard_map(of_device, mesh=mesh, check_vma=False, **specs))(w, image, text)
    for ours, expected in zip(sharded, jax.value_and_grad(loss)(w, image, text), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_masking_kernel_hides_tokens_of_captions_afresh():
    captions = ["kako and guge", "fomu behind kini over logu"] * 100
    tokens = tokenize_captions(captions, vocab_size=300, length=16)
    rules = (Rule("none"), Rule("bernoulli", p=0.3, anchor="none", replacement="placeholder"),
             Rule("bernoulli", p=0.3, anchor="none"))  # fmt: skip
    bank, length = caption_bank(tokens, 3), tokens.ids.shape[1]
    rows = jnp.arange(200)

    @jax.jit
    def shown(rows, rule, epoch):
        return mask_batch(caption_batch(jnp.asarray(tokens.ids)[rows], rows, rule, epoch), bank, jax.random.key(0),
                          length=length, rules=rules).tokens  # fmt: skip

    np.testing.assert_array_equal(shown(rows, 0, 1), tokens.ids)
    first, second, other = (np.asarray(shown(rows, rule, epoch)) for rule, epoch in ((1, 1), (1, 2), (2, 1)))
    hidden = first == tokens.mask
    word = (tokens.ids > 0) & (tokens.ids != 1)  # all but padding and end
    assert not hidden[~word].any() and hidden[word].mean() == pytest.approx(0.3, abs=0.05)
    np.testing.assert_array_equal(first[~hidden], tokens.ids[~hidden])
    assert (hidden != (second == tokens.mask)).mean() > 0.1
    changed = other != tokens.ids
    assert not changed[~word].any() and changed[word].mean() == pytest.approx(0.3, abs=0.07)
    assert set(np.unique(other)) <= set(np.unique(tokens.ids)) and (changed <= hidden).all()  # the same draws
    np.testing.assert_array_equal(shown(rows[::-1], 1, 1)[::-1], first)  # however they are batched


@pytest.mark.parametrize("kind", KINDS)
def test_towers_give_unit_vectors_that_depend_on_their_input_alone(kind):
    config = DualEncoderConfig(image=kind, widths=(8,), width=16, dimensions=8)
    params = init_dual_encoder(config, 50, (12, 12, 1), jax.random.key(0))
    images = jnp.asarray(RNG.random((3, 12, 12, 1)), jnp.float32)
    of_images, of_texts = (jax.jit(encode, static_argnums=1) for encode in (encode_images, encode_texts))
    found = of_images(params, config, images)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    other = of_images(params, config, images.at[0].set(0))
    np.testing.assert_allclose(other[1:], found[1:], atol=1e-5)
    assert abs(other[0] - found[0]).max() > 1e-3
    if kind == "mlp":  # the text tower is the same for all
        tokens = jnp.array([[5, 6, 1, 0, 0], [5, 6, 7, 8, 1]])
        texts = of_texts(params, config, tokens)
        np.testing.assert_allclose(of_texts(params, config, tokens[:1, :3]), texts[:1], atol=1e-5)  # padding is no word
        assert abs(texts[0] - texts[1]).max() > 0.05


def test_glyphs_show_what_the_caption_names_and_three_more():
    world = glyph_world(300, 0)
    assert world.images.shape == (300, 12, 12, 1) and (world.objects.sum(1) == 5).all()
    for caption, objects in zip(world.captions, world.objects, strict=True):
        first, _, second = caption.split()
        assert objects[world.names.index(first)] and objects[world.names.index(second)]
    again = glyph_world(300, 0)
    np.testing.assert_array_equal(world.images, again.images)
    # the same glyph is the same pattern: a table of patterns by name explains the images up to noise
    cells = world.images.reshape(300, 3, 4, 3, 4).swapaxes(2, 3).reshape(300, 9, 16)
    empty = cells.mean(2) < 0.3
    assert (empty.sum(1) == 4).all()


def test_emoji_come_with_their_tags(tmp_path):
    records = [{"caption": f"face {n}", "tags": ["face", *["odd"] * (n % 2)], "skin_variant": n == 0} for n in range(12)]
    np.savez(tmp_path / "e.npz", images=np.full((12, 4, 4, 3), 51, np.uint8))
    (tmp_path / "e_captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = load_captions("emoji", str(tmp_path / "e.npz"))
    assert found.captions[0] == "face 1" and found.names == ("face", "odd") and found.objects.sum(0).tolist() == [11, 6]
    assert found.images.max() == pytest.approx(0.2)
    (tmp_path / "e_captions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="has 12 images for the 1 captions in .*: get both again"):
        load_captions("emoji", str(tmp_path / "e.npz"))
    for bad, message in (("tfds", "need a path"), ("coco", "choose one of glyphs, emoji, tfds")):
        with pytest.raises(UserError, match=message):
            load_captions(bad)


def test_captioned_sets_of_tfds_are_read(tmp_path):
    import tensorflow_datasets as tfds
    from PIL import Image

    of = tfds.features

    class Captioned(tfds.core.GeneratorBasedBuilder):
        """Images in the form of coco_captions."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = of.FeaturesDict({
                "image": of.Image(shape=(None, None, 3)), "captions": of.Sequence({"text": of.Text()}),
                "objects": of.Sequence({"label": of.ClassLabel(names=["cat", "dog"])}),
            })  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, description="Images.", features=features)

        def _split_generators(self, dl_manager):
            return {"val": self._generate_examples()}

        def _generate_examples(self):
            for n in range(12):
                path = tmp_path / f"{n}.png"
                Image.fromarray(np.full((10, 20, 3), 10 * n, np.uint8)).save(path)
                labels = ["cat", "dog"] if n % 2 else ["cat"]
                yield n, {"image": str(path), "captions": {"text": [f"image {n}", "other"]}, "objects": {"label": labels}}

    builder = Captioned(data_dir=str(tmp_path / "sets"), file_format="array_record")
    builder.download_and_prepare()
    found = load_captions("tfds", f"{builder.data_path}:val", side=8)
    assert found.names == ("cat", "dog") and found.objects.sum(0).tolist() == [12, 6]
    for caption, image, objects in zip(found.captions, found.images, found.objects, strict=True):
        number = int(caption.split()[1])
        assert image.shape == (8, 8, 3) and image.mean() == pytest.approx(10 * number / 255, abs=1e-3)
        assert objects.tolist() == [True, number % 2 == 1]
    assert len(load_captions("tfds", f"{builder.data_path}:val", side=8, limit=7).captions) == 7
    with pytest.raises(UserError, match="TFDS has no nothing_such prepared"):
        load_captions("tfds", "nothing_such")


SMALL = CaptionedSetConfig(
    train=32, public=60, heldout=20, epochs=2, batch_size=16, caption_tokens=6,
    encoder=DualEncoderConfig(widths=(16,), width=16, dimensions=8),
)  # fmt: skip


@pytest.mark.slow
def test_models_side_by_side_are_those_alone_and_one_over_all_devices():
    world = glyph_world(100, 0)
    tokens = tokenize_captions(world.captions, vocab_size=300, length=6)
    rows = np.stack([np.arange(32), np.arange(32, 64)] * 4)
    arms = [DejaVuArmConfig(masking=0.5), DejaVuArmConfig(weight_decay=0.1)] * 4
    found = lambda rows, arms: list(  # noqa: E731
        train_dual_encoders(SMALL, world, tokens, rows, np.full(len(rows), 3), arms, title="t")
    )
    (together,), (alone,) = found(rows, arms), found(rows[:1], arms[:1])  # alone: its batch is split over 8 devices
    assert together.epoch == 2 and together.images.shape == (8, 100, 8)
    np.testing.assert_allclose(alone.texts[0], together.texts[0], atol=2e-4)
    np.testing.assert_allclose(alone.images[0], together.images[0], atol=2e-4)
    np.testing.assert_array_equal(together.texts[0], together.texts[2])  # one seed, one arm, one set
    assert abs(together.texts[0] - together.texts[1]).max() > 1e-3


def test_prediction_is_that_of_a_plain_search():
    texts, images = RNG.normal(size=(30, 5)), RNG.normal(size=(200, 5))
    objects, public = RNG.random((30, 9)) < 0.3, RNG.random((200, 9)) < 0.2
    found = predict(texts, images, objects, public, k=4)
    distances, near = NearestNeighbors(n_neighbors=4, metric="cosine", algorithm="brute").fit(images).kneighbors(texts)
    union = public[near].any(1)
    np.testing.assert_array_equal(found.scores.correct, (union & objects).sum(1))
    np.testing.assert_allclose(found.distance, distances[:, 0], atol=1e-5)
    samples = sample_level(found, found, objects.any(1))
    assert {gap for shares in samples.values() for gaps in shares.values() for gap in (gaps["recall"], gaps["f"])} == {0}


def test_retrieval_finds_its_own():
    vectors = RNG.normal(size=(40, 6))
    assert retrieval_recall(vectors, vectors, (1, 5)) == {"recall@1": 1.0, "recall@5": 1.0}
    chance = retrieval_recall(vectors, RNG.normal(size=(40, 6)), (1, 40))
    assert chance["recall@1"] < 0.2 and chance["recall@40"] == 1


def exported(**changes):
    """Embeddings of a model that puts each caption beside public images with its objects, and of one that does not."""
    rng = np.random.default_rng(1)
    public = rng.random((300, 20)) < 0.1
    objects = public[rng.integers(300, size=80)] & (rng.random((80, 20)) < 0.9)
    space = rng.normal(size=(20, 16))
    return {
        "target_texts": objects @ space, "target_images": public @ space, "objects": objects, "public_objects": public,
        "reference_texts": rng.normal(size=(80, 4)), "reference_images": rng.normal(size=(300, 4)),
    } | changes  # fmt: skip


def test_audit_of_exported_embeddings(tmp_path):
    path = tmp_path / "mine.npz"
    arrays = exported(encoder_texts=exported()["target_texts"], encoder_public_texts=exported()["target_images"])
    np.savez(path, **arrays)
    result = audit_vlm(path)
    assert json.loads((tmp_path / "mine.deja_vu.json").read_text()) == result
    two, one = result["tests"]["two_models"], result["tests"]["one_model"]
    assert two["population"]["prg"] > 0.3 and two["intervals"]["prg"][0] > 0.2
    assert result["records"] == arrays["objects"].any(1).sum() and result["records"] + result["without_objects"] == 80
    assert one["population"]["ppg"] == one["population"]["prg"] == one["population"]["aucg"] == 0  # the same embeddings
    near = audit_vlm(path, tmp_path / "other.json", clusters=10, probes=6)
    assert near["tests"]["two_models"]["population"]["prg"] == pytest.approx(two["population"]["prg"], abs=0.1)


@pytest.mark.parametrize(("changes", "message"), [
    ({"objects": None}, "has no objects, only"),
    ({"reference_texts": None, "reference_images": None}, "neither reference_texts nor encoder_texts"),
    ({"reference_images": None}, "has reference_texts without reference_images: add it"),
    ({"target_texts": np.zeros((79, 16))}, "has the shape .80, 4.: it must have two axes, 79 rows"),
    ({"target_images": np.zeros((300, 3))}, "target_texts and target_images in .* have 16 and 3 columns"),
    ({"target_images": np.full((300, 16), np.nan)}, "target_images in .* holds something else than finite numbers"),
    ({"objects": np.zeros((80, 20))}, "objects in .* are all 0"),
])  # fmt: skip
def test_audit_names_what_is_wrong(tmp_path, changes, message):
    np.savez(tmp_path / "bad.npz", **{key: value for key, value in exported(**changes).items() if value is not None})
    with pytest.raises(UserError, match=message):
        audit_vlm(tmp_path / "bad.npz")
    assert not (tmp_path / "bad.deja_vu.json").exists()


TINY = [
    "study.seeds=1", "study.deja_vu.sets.glyphs.train=48", "study.deja_vu.sets.glyphs.public=80",
    "study.deja_vu.sets.glyphs.heldout=40", "study.deja_vu.sets.glyphs.epochs=4",
    "study.deja_vu.sets.glyphs.score_at=[2]", "study.deja_vu.sets.glyphs.batch_size=16",
    "study.deja_vu.sets.glyphs.encoder={widths: [16], width: 16, dimensions: 8}",
    "study.deja_vu.sets.glyphs.arms={plain: {}, mask-50: {masking: 0.5}}",
]  # fmt: skip


def test_the_study_as_a_whole_goes_on_and_can_be_shown(tmp_path, capsys):
    more = "study.deja_vu.sets.emoji={images: emoji, path: nowhere.npz, optional: true}"
    config = load_config(None, [*TINY, more, f"out={tmp_path}"])
    results = run_study("deja-vu", config, command="rmft study deja-vu")
    claims = {claim["id"]: claim for claim in results["claims"]}
    assert claims["glyphs-same-prg"]["measured"] == 0 and claims["glyphs-same-prg"]["holds"]
    assert {"glyphs-ppg", "glyphs-masking-aucg", "glyphs-control-prg"} <= set(claims)
    assert json.loads((tmp_path / "results.json").read_text())["claims"] == results["claims"]
    for table in (text_table, claims_table):
        assert table(results).row_count > 10 or table is claims_table
    assert "Use against memorization" in render(results)
    before = (tmp_path / "parts" / "glyphs-0.json").stat().st_mtime_ns
    assert run_study("deja-vu", config, command="rmft study deja-vu")["claims"] == results["claims"]
    assert (tmp_path / "parts" / "glyphs-0.json").stat().st_mtime_ns == before
    assert {claim["id"].split("-")[0] for claim in results["claims"]} == {"glyphs"}
    assert "without the set emoji, as nowhere.npz is not there" in capsys.readouterr().err


@pytest.mark.parametrize(("override", "message"), [
    ("arms={plain: {masking: 2}}", r"arms.plain: masking lies in \[0, 1\]"),
    ("arms={plain: {replacement: word}}", "arms.plain.replacement is 'word': choose one of placeholder, surrogate"),
    ("encoder.image=cnn", "encoder.image is 'cnn': choose one of mlp, conv, vit"),
    ("encoder={image: vit, patch: 5}", "encoder.patch is 5: choose a number that divides 12 and 12"),
    ("encoder.width=15", "as a GPT: model.width 15 is not divisible"),
    ("batch_size=100", "batch_size is at most train, 48"),
    ("recall_at=[50]", r"recall_at is \[50\]: give numbers from 1 to heldout, 40"),
    ("score_at=[9]", r"score_at is \[9\]: give epochs from 1 to 4"),
    ("limit=100", "has 100 records, but 2 train"),
])  # fmt: skip
def test_bad_settings_are_named_before_anything_is_trained(tmp_path, override, message):
    config = load_config(None, [*TINY, f"study.deja_vu.sets.glyphs.{override}", f"out={tmp_path}"])
    with pytest.raises(UserError, match=message):
        run_study("deja-vu", config, command="")
    assert not list(tmp_path.iterdir())
