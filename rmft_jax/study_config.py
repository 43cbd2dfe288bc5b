"""What the studies take: the part of the configuration below `study`. See `config`."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ArmConfig:
    """One arm of an experiment. vary: what it changes in the config.

    passes: how often the special batch is shown, 0 = never, the control. spacing: epochs between one pass and the next, in
    whole rounds, 0 = one right after the other. ids: prepended (each block begins with a token of its own in the place of
    its context) | vocabulary (there are as many tokens more, but none is used) | none.
    """

    vary: dict[str, typing.Any] = field(default_factory=dict)
    passes: int = 0
    spacing: float = 0.0
    ids: str = "none"


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment of `rmft study scaling`: every arm at every size, under every seed.

    sizes: of the ladder, empty = all. changes: to the config, of all arms; with other data they are prepared apart.
    epochs: how many each takes at most. until: all of a size stop once each has memorized this share of its training text,
    0 = never. inject_at: after how many epochs the special batch is shown (of spaced passes, the first), 0 = there is
    none; it is a batch of held-out blocks, at most half of all. score_training: score the training text as it stands after
    each round too. rounds: how many an epoch has; after each, held-out text is scored.
    """

    sizes: tuple[str, ...] = ()
    changes: dict[str, typing.Any] = field(default_factory=dict)
    epochs: int = 100
    until: float = 0.0
    inject_at: int = 0
    score_training: bool = False
    rounds: int = 1
    arms: dict[str, ArmConfig] = field(default_factory=lambda: {"plain": ArmConfig()})


@dataclass(frozen=True)
class ScalingConfig:
    """The ladder of sizes of `rmft study scaling` and what is done with it.

    ladder: name -> what it changes in the config. taus: shares of the training text.
    side_by_side: seeds and arms of one shape in one program; false = one after the other, each split over config.mesh.
    """

    ladder: dict[str, dict] = field(default_factory=dict)
    taus: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    side_by_side: bool = True
    experiments: dict[str, ExperimentConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class NoisyArmConfig:
    """One way of training on partly wrong labels.

    noise: symmetric (a share of the labels is drawn anew from all classes) | asymmetric (a share of each class in `flips`
    becomes another class, flips[class]). method: ce (cross entropy) | elr | elr_plus | kl (the control); weight: lambda;
    beta: the momentum of the targets.
    """

    noise: str = "symmetric"
    share: float = 0.4
    method: str = "ce"
    weight: float = 3.0
    beta: float = 0.7


@dataclass(frozen=True)
class NoisyLabelsConfig:
    """Classifiers of one set of images in `rmft study early-learning`, trained for each arm and seed.

    images, path: what `data.images.load_images` reads; limit, test_limit: images of each split at most, 0 = all.
    model: mlp | conv | resnet18 | resnet34; widths: of the layers of an mlp or a conv. together: all in one batched program,
    false = one after the other. flips: see the arms. score_every: epochs between points of the curves.
    drop_at, drop: epochs after which the learning rate is divided by so much. augment: random shifts and mirrors.
    mixup, average_decay: of ELR+, the parameter of its Beta distribution and the decay of the averages of the weights.
    """

    images: str = "digits"
    path: str = ""
    limit: int = 0
    test_limit: int = 0
    model: str = "mlp"
    widths: tuple[int, ...] = (512, 512)
    together: bool = True
    flips: dict[str, typing.Any] = field(default_factory=dict)
    arms: dict[str, NoisyArmConfig] = field(default_factory=dict)
    epochs: int = 250
    score_every: int = 5
    batch_size: int = 128
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 0.0
    drop_at: tuple[int, ...] = ()
    drop: float = 100.0
    augment: bool = False
    mixup: float = 1.0
    average_decay: float = 0.997


@dataclass(frozen=True)
class LinearNoiseConfig:
    """The linear model of Theorem 1 of arXiv 2007.00151.

    points, features: n and p. share: of the labels that are drawn anew. deviation: s, of each feature about its mean.
    steps: of gradient descent with learning_rate. weight, beta: of early-learning regularization beside it.
    """

    points: int = 1200
    features: int = 1000
    share: float = 0.5
    deviation: float = 0.1
    learning_rate: float = 0.1
    steps: int = 12000
    weight: float = 3.0
    beta: float = 0.7


@dataclass(frozen=True)
class EarlyLearningConfig:
    """What `rmft study early-learning` does: the linear model, then each of `sets`, name -> classifiers."""

    linear: LinearNoiseConfig = field(default_factory=LinearNoiseConfig)
    sets: dict[str, NoisyLabelsConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldedImagesConfig:
    """Variational autoencoders of one set of images in `rmft study m-score`, trained on folds of it.

    images, path, limit: what `data.images.load_images` reads; the training split is what is cut into folds.
    model: mlp (Bernoulli, of images binarised once) | conv (Gaussian); widths: of its layers; latent: latent variables.
    folds, repetitions: K and L. score_at: epochs at which the score is taken, the last one ends training.
    samples: of importance sampling, a multiple of 16. together: all runs in one batched program, false = one after
    the other.
    neighbours: compare with nearest neighbours among held-out images and samples. gallery: images shown in the report.
    """

    images: str = "digits"
    path: str = ""
    limit: int = 0
    model: str = "mlp"
    widths: tuple[int, ...] = (256, 128)
    latent: int = 8
    folds: int = 5
    repetitions: int = 3
    score_at: tuple[int, ...] = (25, 100, 300)
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (1e-3, 1e-4)
    samples: int = 128
    together: bool = True
    neighbours: bool = True
    gallery: int = 12


@dataclass(frozen=True)
class FoldedTextConfig:
    """GPTs trained on folds of the documents of `source` in `rmft study m-score`.

    arms: name -> what it changes in the config, the first one without a defence; empty = no such runs.
    folds, repetitions: K and L; copies of a document share its fold. score_at: after which passes over its documents each
    run is scored; the last one ends it.
    """

    arms: dict[str, dict] = field(default_factory=dict)
    folds: int = 5
    repetitions: int = 2
    score_at: tuple[int, ...] = (2, 4, 8)


@dataclass(frozen=True)
class MScoreConfig:
    """What `rmft study m-score` does: each of `sets`, name -> autoencoders of images, then `text`."""

    sets: dict[str, FoldedImagesConfig] = field(default_factory=dict)
    text: FoldedTextConfig = field(default_factory=FoldedTextConfig)


@dataclass(frozen=True)
class PromptSetConfig:
    """Few-shot classification of one set of texts by one model in `rmft study retroprompt`.

    texts, path, text_field, label_field, skip_field, words: what `data.labelled.load_labelled` reads. template: between text
    and answer. length: tokens of a prompt. shots: training texts of each label; test: texts to test on. flipped: share of
    the training labels that are made wrong.
    start: a folder that `rmft convert import` wrote, of which the last `trained_blocks` blocks are trained; "" = `model`,
    pre-trained on `pretrain_texts` made-up reviews without labels for `pretrain_epochs`, of which all is trained.
    causal: the left-to-right form; false = a masked language model. together: members in one batched program.
    epochs, batch_size, learning_rate: of Adam on the few examples.
    demonstrations: m, the examples that each class's neural demonstration is made of, 0 = none are tried.
    betas: of the guided loss; beta, share, at_k: beta, lambda and k of the whole method. train_k: neighbours that guide the
    loss. k, shares: what the sweep over k and lambda takes. temperature: of P_kNN, 1 = the paper.
    damping: of the curvature in influence scores. left_out: runs without one example, for each of so many of the first
    seed, to hold influence scores against, 0 = none.
    optional: leave the set out, and say so, where `start` or `path` is not there; else that is an error.
    """

    texts: str = "reviews"
    path: str = ""
    text_field: str = "text"
    label_field: str = "label"
    skip_field: str = ""
    words: dict[str, typing.Any] = field(default_factory=dict)
    template: str = " It was"
    length: int = 48
    shots: int = 16
    test: int = 500
    flipped: float = 0.0
    start: str = ""
    trained_blocks: int = 1
    pretrain_texts: int = 4000
    pretrain_epochs: int = 6
    causal: bool = True
    together: bool = True
    epochs: int = 30
    batch_size: int = 8
    learning_rate: float = 3e-4
    demonstrations: int = 8
    betas: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    beta: float = 0.1
    share: float = 0.2
    at_k: int = 16
    train_k: int = 16
    k: tuple[int, ...] = (1, 4, 16)
    shares: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    temperature: float = 1.0
    damping: float = 0.01
    left_out: int = 0
    optional: bool = False


@dataclass(frozen=True)
class LookupArmConfig:
    """One way of training a language model beside a datastore.

    vary: what it changes in the config, such as {masking: {policy: keep_first}}; the store holds the true text all the same.
    loss: plain | guided (each token weighed by 1 + beta F) | mixed (-log of the mixture of neighbours and weights, so that
    these learn what the store does not know). The neighbours of a token are those in other documents.
    epochs: passes over the text, 0 = as many as the others take. (Fewer under the plain loss are the control: a model that
    knows less gives away less.)
    """

    vary: dict[str, typing.Any] = field(default_factory=dict)
    loss: str = "plain"
    epochs: int = 0


@dataclass(frozen=True)
class LookupTextConfig:
    """GPTs with a datastore of their training text in `rmft study retroprompt`.

    changes: to the config, of all arms. arms: name -> how it is trained, the first one plainly; empty = none.
    epochs: passes over the text; refresh: epochs between one look at all neighbours and the next.
    k, share, temperature, beta: of P_kNN by squared distance, lambda, and the guided loss.
    """

    changes: dict[str, typing.Any] = field(default_factory=dict)
    arms: dict[str, LookupArmConfig] = field(default_factory=dict)
    epochs: int = 16
    refresh: int = 2
    k: int = 16
    share: float = 0.5
    temperature: float = 10.0
    beta: float = 0.5


@dataclass(frozen=True)
class RetroPromptConfig:
    """What `rmft study retroprompt` does: each of `sets`, name -> classification, then `text`, the language model."""

    sets: dict[str, PromptSetConfig] = field(default_factory=dict)
    text: LookupTextConfig = field(default_factory=LookupTextConfig)


@dataclass(frozen=True)
class DualEncoderConfig:
    """An image tower and a text tower. image: mlp | conv | vit; widths: layers of an mlp or a conv; patch: side of a vit's.

    layers, width, heads: of the GPT that reads captions, and of a vit. dimensions: of the space in which both meet.
    """

    image: str = "mlp"
    widths: tuple[int, ...] = (256,)
    patch: int = 4
    layers: int = 1
    width: int = 64
    heads: int = 2
    dimensions: int = 64


@dataclass(frozen=True)
class DejaVuArmConfig:
    """What keeps a dual encoder from memorizing its captions.

    masking: the share of a caption's tokens that is hidden, drawn afresh each epoch; replacement: placeholder (one token
    for all) | surrogate (tokens of other captions). max_scale: of the logits, one over the lowest temperature.
    """

    masking: float = 0.0
    replacement: str = "placeholder"
    max_scale: float = 100.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class CaptionedSetConfig:
    """Dual encoders of one set of captioned images in `rmft study deja-vu`.

    images, path, limit, side: what `data.captions.load_captions` reads. For each seed the records are shuffled: the first
    train are A, then train B, public the public set, and heldout pairs that no model sees.
    vocab_size, caption_tokens: of the byte-pair encoding, and of the longest caption. encoder: the model.
    epochs, batch_size, learning_rate (Adam; a rise over the first twentieth, then half a cosine down to 0): of training.
    score_at: epochs at which all is measured; epochs too, always. neighbours: k. recall_at: what retrieval is measured at.
    together: all models in one batched program, false = one after the other.
    arms: name -> a way to train; the first one is without a defence.
    optional: leave the set out, and say so, where the file `path` is not there; else that is an error.
    """

    images: str = "glyphs"
    path: str = ""
    limit: int = 0
    side: int = 32
    train: int = 2000
    public: int = 4000
    heldout: int = 2000
    vocab_size: int = 2000
    caption_tokens: int = 16
    encoder: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    epochs: int = 100
    batch_size: int = 200
    learning_rate: float = 2e-3
    score_at: tuple[int, ...] = ()
    neighbours: int = 10
    recall_at: tuple[int, ...] = (1, 10)
    together: bool = True
    arms: dict[str, DejaVuArmConfig] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class DejaVuConfig:
    """What `rmft study deja-vu` does: each of `sets`, name -> dual encoders of captioned images."""

    sets: dict[str, CaptionedSetConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyConfig:
    """What `rmft study` varies.

    methods: name -> what it changes in the config, as nested keys; the first, without changes, is the baseline.
    seeds: how many times each method is trained, with seed, seed + 1, ...
    budgets: epochs (all methods take as many epochs, as the RMFT paper did) | updates (methods whose data are smaller are
    trained a second time, for as many updates as the baseline).
    pretrain: what to change to get the run that all start from, such as {source: {path: general.txt}}; {} = none.
    scaling, early_learning, m_score, deja_vu, retroprompt: what the studies of that name take in the place of methods,
    budgets and pretrain.
    """

    methods: dict[str, dict] = field(default_factory=dict)
    seeds: int = 3
    budgets: tuple[str, ...] = ("epochs", "updates")
    pretrain: dict[str, typing.Any] = field(default_factory=dict)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    early_learning: EarlyLearningConfig = field(default_factory=EarlyLearningConfig)
    m_score: MScoreConfig = field(default_factory=MScoreConfig)
    retroprompt: RetroPromptConfig = field(default_factory=RetroPromptConfig)
    deja_vu: DejaVuConfig = field(default_factory=DejaVuConfig)
