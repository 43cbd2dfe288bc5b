"""The configuration: frozen dataclasses, read from YAML, overridden by `key.path=value`, checked before any device is used.

The defaults are a complete small experiment on the bundled synthetic corpus: what `rmft demo` runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import pkgutil
import re
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import yaml

from rmft_jax.errors import UserError
from rmft_jax.includes import merge, read_includes, read_tree
from rmft_jax.paths import as_path
from rmft_jax.study_config import StudyConfig


@dataclass(frozen=True)
class SourceConfig:
    """Where the text comes from.

    format: synthetic (bundled generator) | jsonl (one object a line) | csv | parquet | text (documents separated by a
    line) | mbox | maildir (a folder of messages, a file each, or a .tar.gz of one) | python_docs (the help topics that come
    with the Python in use, a document each) | tfds (a data set of TFDS: path is its name, or the folder that it was prepared
    in, split the part to read, heldout_path another split) | array_record (a file, or a pattern of several) | grain (an
    object, path is package.module:object: docs/data.md). Files of lines may be .gz or .zst.
    text_field: the text of a record; "" = records of array_record or grain are the text themselves.
    version: of a grain source, whatever you like: another one makes `prepare` start anew.
    mail: parse each text as a mail message, as mbox and maildir do (docs/data.md).
    limit: documents to take, 0 = all (synthetic: how many to write). max_characters: cut each document there, 0 = never.
    heldout_path: a file of the same format; without one, `heldout_fraction` of the documents is set aside, drawn by `seed`.
    on_error: raise | skip (skipped documents are counted in the manifest). seed: of all that is random in the data.
    shard_characters: size of the pieces of the corpus that `prepare` works on in parallel, a file of the data set each.
    """

    format: str = "synthetic"
    path: str = ""
    split: str = "train"
    version: str = ""
    text_field: str = "text"
    separator: str = "<|endoftext|>"
    mail: bool = False
    limit: int = 500
    max_characters: int = 0
    heldout_path: str = ""
    heldout_limit: int = 0
    heldout_fraction: float = 0.1
    on_error: str = "raise"
    seed: int = 0
    shard_characters: int = 8_000_000


@dataclass(frozen=True)
class TokenizerConfig:
    """A SentencePiece model trained on the corpus, its PII left out. vocab_size counts the 256 byte pieces.

    path: a tokenizer to take instead, which has its own vocabulary: a SentencePiece model, such as that of other prepared
    data (their tokenizer.model), or a tokenizer.json of Hugging Face; both without loss, such as byte-level BPE. Where the
    config.json of a model stands beside tokenizer.json, its vocab_size counts.
    train_characters: text to train on, drawn at random from the training documents where they have more.
    """

    vocab_size: int = 2048
    model_type: str = "bpe"
    path: str = ""
    train_characters: int = 100_000_000


# Built-in types of personal data, each a module of that name.
PII_TYPES = tuple(sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "pii" / "types")])))


@dataclass(frozen=True)
class CustomPiiConfig:
    """A type of personal data of the user's own: what a pattern matches, or the entries of a word list.

    name: lower-case letters, digits and underscores. pattern: a regular expression as Python's `re` reads it.
    words: a file with one word or phrase a line; found as whole words, in any case.
    checksum: none | luhn | mod97 (ISO/IEC 7064), of letters and digits; a match without it is none.
    """

    name: str = ""
    pattern: str = ""
    words: str = ""
    checksum: str = "none"


@dataclass(frozen=True)
class PiiConfig:
    """What counts as personal data.

    types: among PII_TYPES; `person` needs the extra [presidio]. custom: further types.
    ignore: normalised values that belong to nobody, such as no.address@enron.com.
    phone_region: the country that phone numbers without '+' belong to, two capital letters.
    person_model: the spaCy model that finds names, installed, or a path.
    """

    types: tuple[str, ...] = ("email",)
    ignore: tuple[str, ...] = ()
    phone_region: str = "US"
    person_model: str = "en_core_web_sm"
    custom: tuple[CustomPiiConfig, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all types, in the order of their numbers."""
        return (*self.types, *(custom.name for custom in self.custom))


@dataclass(frozen=True)
class CanaryConfig:
    """Invented addresses that `prepare` plants in the training documents, to measure how well they are remembered.

    count: canaries for each number in `repetitions`; 0 = none. repetitions: in how many documents a canary stands.
    references: addresses drawn from the same space that its perplexity is ranked among.
    """

    count: int = 0
    repetitions: tuple[int, ...] = (1, 2, 4, 8, 16)
    references: int = 1000


@dataclass(frozen=True)
class MaskingRuleConfig:
    """How the spans of a PII type are masked (`kernels.masking` says what each means).

    policy: none | all | keep_first (RMFT) | keep_random (another occurrence stays each epoch) | bernoulli (replaced with
    probability `p`) | cap (at most `k` true showings of a value over the whole training).
    anchor: what stays of a replaced value. random (one component, RMFT) | none | shared (components that at least
    `shared_by` different values of the corpus have, the rarest one never).
    replacement: surrogate | placeholder. stock: where surrogates come from, invented | recombined (from components of other
    values of the corpus) | look_alike (the same, with strings like them for components that one value alone has).
    fresh: other surrogates each epoch; false = the same for the whole training.
    """

    policy: str = "keep_first"
    p: float = 0.5
    k: int = 1
    anchor: str = "random"
    shared_by: int = 10
    replacement: str = "surrogate"
    stock: str = "invented"
    fresh: bool = True


@dataclass(frozen=True)
class MaskingConfig(MaskingRuleConfig):
    """Randomized masking inside the train step: a rule for all PII types, and other ones for single types.

    types: for a PII type, what differs from the rule above, such as {phone: {policy: all}}.
    scope: what gets a surrogate of its own, and counts as one showing. occurrence (RMFT) | document (all occurrences of a
    value in a document) | corpus (one surrogate everywhere; showings are occurrences).
    margin: tokens of each sequence left free when blocks are cut, so that longer surrogates push no text out.
    surrogates: rows of the surrogate bank for each kind of component.
    """

    scope: str = "occurrence"
    margin: int = 8
    surrogates: int = 4096
    types: dict[str, MaskingRuleConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class DedupConfig:
    """Deduplication, the rival method. `prepare` flags duplicates, `train` leaves them out under `policy`.

    policy: none | near (near-duplicate documents) | near_exact (then repeated substrings too, as the RMFT paper did).
    minhash: what finds near-duplicates. rensa (fast; candidates are held against their signatures) | datasketch (exactly
    what its MinHash and MinHashLSH find with their defaults, as published pipelines do; needs the extra [datasketch]).
    substring_tokens: length of a repeated run of tokens that counts as duplicate; 0 = as many as hold 100 bytes on average.
    most_tokens: corpora of more training tokens are not searched for repeated substrings, which takes 50 bytes of memory a
    token; nor for near-duplicates if they have more than a document for each 60 of these tokens, as one takes 3 KB.
    """

    policy: str = "none"
    minhash: str = "rensa"
    near_threshold: float = 0.8
    permutations: int = 128
    substring_tokens: int = 0
    most_tokens: int = 32_000_000


@dataclass(frozen=True)
class LossConfig:
    """What counts in the loss: mean over targets of weight x (nll + elr_weight x penalty), divided by the sum of weights.

    pii_weight: of the tokens of true PII as targets, 0 = PII loss masking. surrogate_weight: of the tokens of surrogates.
    goldfish: none | static | hash, leave one token in `goldfish_k` out of the loss; hash looks at the `goldfish_context`
    tokens before it, so that repeated text drops the same tokens (Hans et al. 2024).
    elr_weight: of early-learning regularization (Liu et al. 2020), 0 = off; its targets are the predictions of an average of
    the weights with decay `elr_decay`, which costs a second forward pass and a copy of the parameters. With elr_top K above
    0 they are, as published, running averages of the predictions of each true token of the training text, of momentum
    `elr_beta`, cut to their K largest classes: 8 K bytes a token of the corpus.
    """

    pii_weight: float = 1.0
    surrogate_weight: float = 1.0
    goldfish: str = "none"
    goldfish_k: int = 4
    goldfish_context: int = 13
    elr_weight: float = 0.0
    elr_decay: float = 0.997
    elr_top: int = 0
    elr_beta: float = 0.7


@dataclass(frozen=True)
class PrivacyConfig:
    """DP-SGD (Abadi et al. 2016); needs the extra [dp]. The privacy unit is one block of packed text.

    noise_multiplier: standard deviation of the noise / clip_norm, 0 = off. epsilon: a target to compute it from instead.
    clip_norm: bound on the norm of each block's gradient. delta: 0 = 1 / number of blocks.
    sampling: what the accountant takes for granted. poisson (each block is in a step by an independent coin; usual in the
    literature, but the loader shuffles epochs, so that epsilon is an estimate) | shuffled (holds for the loader as it is,
    without amplification by sampling, so that epsilon is larger).
    microbatch: blocks whose gradients are held at once, 0 = all of a step.
    """

    noise_multiplier: float = 0.0
    epsilon: float = 0.0
    clip_norm: float = 1.0
    delta: float = 0.0
    sampling: str = "poisson"
    microbatch: int = 0

    @property
    def on(self) -> bool:
        """Return whether DP-SGD is switched on."""
        return self.noise_multiplier > 0 or self.epsilon > 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. The defaults are Llama's; docs of `models.huggingface` name the families that fit.

    layers, width, heads: blocks, features of the residual stream, query heads of a block.
    kv_heads: key and value heads, each shared by heads / kv_heads query heads; 0 = heads.
    head_width: features of a head; 0 = width / heads.
    mlp_width: hidden features of the MLP; 0 = 8/3 width with swiglu, 4 width else.
    positions: rotary (angles between queries and keys) | learned (a vector for each place in a document).
    max_positions: places that learned positions have; to rotary ones no bound, only noted in an export.
    rope_base: of the rotary wavelengths. rotary_share: the share of a head's features that is rotated, the first ones.
    norm: rms | layer (with biases). norm_epsilon: added to the mean square or the variance.
    qk_norm: RMSNorm over the features of each query and key head.
    activation: swiglu | gelu (by the error function) | gelu_new (by tanh).
    qkv_bias, out_bias, mlp_bias: biases of the query-key-value projection, the attention's output, both MLP layers.
    attention_scale: what the scores of attention are multiplied by; 0 = head width ** -0.5.
    local_window: tokens that a token of a local layer sees, itself included; 0 = no local layers.
    local_every: which layers are local: 1 = all, 2 = the second, the fourth, ..., 3 = the third, the sixth, ...
    parallel: attention and MLP both read the block's input, and both are added to it.
    tied: the output matrix is the embedding.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0
    head_width: int = 0
    mlp_width: int = 0
    positions: str = "rotary"
    max_positions: int = 2048
    rope_base: float = 10000.0
    rotary_share: float = 1.0
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    qk_norm: bool = False
    activation: str = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 0.0
    local_window: int = 0
    local_every: int = 2
    parallel: bool = False
    tied: bool = True

    @property
    def mlp(self) -> int:
        """Return the hidden width of the MLP."""
        return self.mlp_width or (-(-8 * self.width // 3 // 16) * 16 if self.gated else 4 * self.width)

    @property
    def gated(self) -> bool:
        """Return whether the MLP multiplies what it passes on by a gate."""
        return self.activation == "swiglu"

    @property
    def groups(self) -> int:
        """Return the number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Return the number of features of a head."""
        return self.head_width or self.width // self.heads

    @property
    def rotated(self) -> int:
        """Return how many features of a head are rotated."""
        return int(self.head_dim * self.rotary_share) if self.positions == "rotary" else 0

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Return whether each layer is local."""
        return tuple(bool(self.local_window) and n % self.local_every == 0 for n in range(1, self.layers + 1))


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021): only adapters of matrices are trained, the model itself (training.init_from) stays.

    rank: 0 = off, all parameters are trained. alpha: what an adapter adds is multiplied by alpha / rank.
    targets: matrices that get one. qkv | out (of the attention) | up (with the gate, if there is one) | down (of the MLP).
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv", "out", "up", "down")


@dataclass(frozen=True)
class MixConfig:
    """Another corpus to train on beside the run's own (docs/data.md).

    data: the folder that `rmft prepare` wrote, with the same tokenizer and the same types of personal data.
    weight: the share of the sequences that are drawn from it, above 0. Those of all such corpora add up to less than 1; the
    rest are of the run's own.
    """

    data: str = ""
    weight: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation. batch_size: sequences per step over all devices; steps 0 = `epochs` passes over the data.

    mix: other corpora to train on, each with its share of the sequences; `epochs` are those of the run's own data.
    dropout: probability, on the embedding and on what each attention and MLP adds to the residual stream.
    early_stopping: stop when held-out perplexity has not improved for so many checkpoints, 0 = never; the best checkpoint
    is then the model handed over.
    accumulation: microbatches that the batch is cut into, one after the other through the model, to save memory.
    loss_chunk: tokens of a device whose logits are held at once, 0 = all. z_loss: weight of log(Z)^2 in the loss, where Z is
    the sum of exp(logits).
    packing: concatenate (documents one after the other, cut into rows of one length, as the RMFT paper did) | best_fit (rows
    that hold documents whole but for those longer than a row, with padding; of the training data).
    remat: what the backward pass computes again instead of keeping it. none | full (all inside a block) | dots (all but
    matrix products).
    optimizer: adamw | adafactor (Shazeer & Stern 2018) | lion (Chen et al. 2023) | muon (Jordan et al. 2024, on the matrices
    of the blocks; AdamW on the rest). beta1 and beta2 are theirs where they have such; adafactor has none.
    schedule: linear | cosine | wsd (warm-up, stable, linear decay over the last `decay_share` of the steps; Hu et al. 2024).
    skip_above: leave out a step whose loss is over so many times the running average of the losses; 0 = only steps whose
    loss or gradient is not finite.
    attention: auto (fused where that can serve) | xla | triton (on GPU) | splash (on TPU), see kernels.fused_attention.
    steps_per_dispatch: steps that the host hands over at once, for models so small that handing over takes longer.
    wandb: a project of Weights & Biases that gets the scalars of TensorBoard too (extra [wandb]), "" = none.
    profile_at: step from which 5 dispatches are traced into the run's directory `profile`, 0 = none.
    objective: causal | masked (each token is hidden with probability `mask_share` and guessed from all others of its
    document; Devlin et al. 2019, without replacements other than the mask; for `rmft study scaling` alone).
    """

    batch_size: int = 16
    accumulation: int = 1
    packing: str = "concatenate"
    sequence_length: int = 128
    epochs: float = 6.0
    steps: int = 0
    init_from: str = ""
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    schedule: str = "linear"
    decay_share: float = 0.2
    final_learning_rate_ratio: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.0
    early_stopping: int = 0
    beta1: float = 0.9
    beta2: float = 0.98
    gradient_clip: float = 1.0
    skip_above: float = 0.0
    dtype: str = "float32"
    loss_chunk: int = 0
    z_loss: float = 0.0
    remat: str = "none"
    attention: str = "auto"
    steps_per_dispatch: int = 1
    profile_at: int = 0
    log_every: int = 20
    wandb: str = ""
    objective: str = "causal"
    mask_share: float = 0.15
    mix: tuple[MixConfig, ...] = ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the share of each corpus in `mix`."""
        return tuple(part.weight for part in self.mix)

    @property
    def own_share(self) -> float:
        """Return the share of the sequences that are of the run's own data, of the weights as they are written."""
        return float(1 - sum(Fraction(str(weight)) for weight in self.weights))


@dataclass(frozen=True)
class TrackerConfig:
    """What is memorized while training (docs/tracker.md): memorization.jsonl, a record every training.log_every steps.

    examples: follow each block of an epoch too, 12 bytes each.
    lengths: places of the histogram of run lengths, the last one for all from there on; 0 = one for each that there can be.
    tags: a .npy file of integers, one for each token of the training documents in the order of the corpus, duplicates
    included: 0 = none, n = the n-th of tag_names. Each name is a slice.
    """

    enabled: bool = False
    examples: bool = True
    lengths: int = 0
    tags: str = ""
    tag_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 (at most once) takes what is left.

    replica: copies of the model, each with its share of the batch. fsdp: the batch too, with parameters and optimizer state
    split. tensor: heads, MLP and vocabulary. context: the positions of each sequence.
    """

    replica: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """count: evenly spaced checkpoints, all kept, for the audit. every_steps, every_minutes: further ones to resume
    from (0 = none). The newest keep_last of those stay, and with keep_hours one in so many hours (0 = none)."""

    count: int = 4
    every_steps: int = 0
    every_minutes: float = 0.0
    keep_last: int = 2
    keep_hours: float = 0.0


@dataclass(frozen=True)
class AuditConfig:
    """The attacks on each checkpoint. prompts: number per prompt set; sets: heldout, web, general, discoverable.

    web_path, general_path: text for web and general prompts: a .jsonl(.gz) file with `web_field`, a text file, `synthetic`
    (bundled prose), or "" (no such prompts).
    metrics: what else to measure, see memorization.metrics. samples: windows, documents and addresses that they score at
    most. temperature, top_k, top_p: the sampling that (n, p)-discoverable extraction takes for granted.
    reference: a run (or RUN/checkpoints/STEP) with the same tokenizer whose model has not seen the training documents, for
    the membership attack of that name; "" = without.
    aurc_budget_pct: AURC counts leaks within budgets from 0 to this many percent of the baseline's perplexity.
    """

    prompts: int = 192
    sets: tuple[str, ...] = ("heldout", "web", "general", "discoverable")
    prompt_tokens: int = 64
    new_tokens: int = 48
    batch_size: int = 256
    web_path: str = "synthetic"
    web_field: str = "text"
    general_path: str = "synthetic"
    metrics: tuple[str, ...] = (
        "similarity",
        "log_probability_gap",
        "discoverable_50",
        "n_p",
        "extraction_strength",
        "k_eidetic",
        "exposure",
        "membership",
    )
    samples: int = 200
    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 1.0
    reference: str = ""
    aurc_budget_pct: float = 20.0
    confidence: float = 0.95
    bootstrap: int = 1000


@dataclass(frozen=True)
class Config:
    """One experiment. `out` holds the prepared data (`out/data`) and the runs (`out/runs/NAME`); it may be gs://.

    seed: of the initial parameters, the order of the data, the surrogates and the attack's prompts; the data themselves
    depend on source.seed.

    name: the run's name; empty = what is switched on (`method`), or baseline. data: prepared data elsewhere.
    """

    out: str = "runs/demo"
    name: str = ""
    data: str = ""
    seed: int = 0
    source: SourceConfig = field(default_factory=SourceConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    study: StudyConfig = field(default_factory=StudyConfig)

    def __post_init__(self) -> None:
        for rule in _rules(self):
            raise UserError(rule)

    @property
    def method(self) -> str:
        """Name the defences that are switched on, joined by '+' in the order of METHODS; none without any."""
        return "+".join(name for name, is_on in METHODS.items() if is_on(self)) or "none"

    @property
    def run_name(self) -> str:
        """Return the run's directory name."""
        return self.name or {"none": "baseline"}.get(self.method, self.method)

    @property
    def data_dir(self) -> Path:
        """Return the directory of the prepared data."""
        return as_path(self.data) if self.data else as_path(self.out) / "data"

    @property
    def run_dir(self) -> Path:
        """Return the run's directory."""
        return as_path(self.out) / "runs" / self.run_name


def _masked_by(config: Config) -> set[str]:
    """Return what comes in the place of PII under the masking rules that replace any."""
    rules = [rule for rule in (config.masking, *config.masking.types.values()) if rule.policy != "none"]
    return {rule.stock if rule.replacement == "surrogate" else rule.replacement for rule in rules}


# What each defence is called, and when it is switched on. Weight decay is one where it is more than usual.
METHODS: dict[str, typing.Callable[[Config], bool]] = {
    "rmft": lambda config: "invented" in _masked_by(config),
    "recombination": lambda config: bool({"recombined", "look_alike"} & set(_masked_by(config))),
    "redaction": lambda config: "placeholder" in _masked_by(config),
    "dedup": lambda config: config.dedup.policy != "none",
    "goldfish": lambda config: config.loss.goldfish != "none",
    "pii_loss": lambda config: config.loss.pii_weight != 1,
    "surrogate_loss": lambda config: config.loss.surrogate_weight != 1,
    "elr": lambda config: config.loss.elr_weight > 0,
    "weight_decay": lambda config: config.training.weight_decay > TrainingConfig.weight_decay,
    "dropout": lambda config: config.training.dropout != TrainingConfig.dropout,
    "early_stopping": lambda config: config.training.early_stopping > 0,
    "dp": lambda config: config.privacy.on,
}
_CHOICES = {
    "source.format": (
        "synthetic", "jsonl", "csv", "parquet", "text", "mbox", "maildir", "python_docs", "tfds", "array_record", "grain",
    ),
    "source.on_error": ("raise", "skip"),
    "tokenizer.model_type": ("bpe", "unigram"),
    "masking.scope": ("occurrence", "document", "corpus"),
    "dedup.policy": ("none", "near", "near_exact"),
    "dedup.minhash": ("rensa", "datasketch"),
    "loss.goldfish": ("none", "static", "hash"),
    "privacy.sampling": ("poisson", "shuffled"),
    "model.positions": ("rotary", "learned"),
    "model.norm": ("rms", "layer"),
    "model.activation": ("swiglu", "gelu", "gelu_new"),
    "training.optimizer": ("adamw", "adafactor", "lion", "muon"),
    "training.schedule": ("linear", "cosine", "wsd"),
    "training.packing": ("concatenate", "best_fit"),
    "training.objective": ("causal", "masked"),
    "training.dtype": ("float32", "bfloat16"),
    "training.remat": ("none", "full", "dots"),
    "training.attention": ("auto", "xla", "triton", "splash"),
}
_RANGES = {  # inclusive
    "seed": (0, 2**31 - 1),
    "source.seed": (0, 2**31 - 1),
    "source.limit": (0, None),
    "source.max_characters": (0, None),
    "source.heldout_limit": (0, None),
    "source.heldout_fraction": (0.0, 0.9),
    "source.shard_characters": (1000, 1_000_000_000),
    "tokenizer.vocab_size": (300, 1_000_000),
    "tokenizer.train_characters": (10_000, None),
    "canary.count": (0, 100_000),
    "canary.references": (2, 1_000_000),
    "masking.margin": (0, None),
    "masking.surrogates": (16, 65535),
    "dedup.near_threshold": (0.05, 1.0),
    "dedup.permutations": (16, 1024),
    "dedup.substring_tokens": (0, None),
    "dedup.most_tokens": (0, None),
    "loss.pii_weight": (0.0, 1000.0),
    "loss.surrogate_weight": (0.0, 1000.0),
    "loss.goldfish_k": (2, 2**31 - 1),
    "loss.goldfish_context": (1, 128),
    "loss.elr_weight": (0.0, 1000.0),
    "loss.elr_decay": (0.0, 0.999999),
    "loss.elr_top": (0, 1024),
    "loss.elr_beta": (0.0, 0.9999),
    "privacy.noise_multiplier": (0.0, 1e6),
    "privacy.epsilon": (0.0, 100.0),
    "privacy.clip_norm": (1e-6, 1e6),
    "privacy.delta": (0.0, 0.5),
    "privacy.microbatch": (0, None),
    "model.layers": (1, None),
    "model.width": (2, None),
    "model.heads": (1, None),
    "model.kv_heads": (0, None),
    "model.head_width": (0, None),
    "model.mlp_width": (0, None),
    "model.max_positions": (1, None),
    "model.rope_base": (1.0, None),
    "model.rotary_share": (0.0, 1.0),
    "model.norm_epsilon": (0.0, 1.0),
    "model.attention_scale": (0.0, None),
    "model.local_window": (0, None),
    "model.local_every": (1, None),
    "lora.rank": (0, None),
    "lora.alpha": (1e-6, 1e6),
    "training.batch_size": (1, None),
    "training.accumulation": (1, None),
    "training.loss_chunk": (0, None),
    "training.z_loss": (0.0, 1.0),
    "training.sequence_length": (8, None),
    "training.epochs": (0.0, None),
    "training.steps": (0, None),
    "training.learning_rate": (0.0, 10.0),
    "training.warmup_steps": (0, None),
    "training.final_learning_rate_ratio": (0.0, 1.0),
    "training.weight_decay": (0.0, 10.0),
    "training.dropout": (0.0, 0.9),
    "training.early_stopping": (0, None),
    "training.beta1": (0.0, 0.9999),
    "training.beta2": (0.0, 0.99999),
    "training.gradient_clip": (0.0, None),
    "training.decay_share": (0.0, 1.0),
    "training.skip_above": (0.0, None),
    "training.steps_per_dispatch": (1, 10_000),
    "training.profile_at": (0, None),
    "training.mask_share": (0.01, 0.99),
    "training.log_every": (1, None),
    "tracker.lengths": (0, None),
    "checkpoint.count": (1, None),
    "checkpoint.every_steps": (0, None),
    "checkpoint.every_minutes": (0.0, None),
    "checkpoint.keep_last": (1, None),
    "checkpoint.keep_hours": (0.0, 1e6),
    "audit.prompts": (1, None),
    "audit.prompt_tokens": (1, None),
    "audit.new_tokens": (1, None),
    "audit.batch_size": (1, None),
    "audit.aurc_budget_pct": (0.1, None),
    "audit.confidence": (0.5, 0.9999),
    "audit.bootstrap": (10, 1_000_000),
    "audit.samples": (1, None),
    "audit.temperature": (1e-3, 1e3),
    "audit.top_k": (0, None),
    "audit.top_p": (1e-6, 1.0),
    "study.seeds": (1, None),
}
_RULE_CHOICES = {
    "policy": ("none", "all", "keep_first", "keep_random", "bernoulli", "cap"),
    "anchor": ("random", "none", "shared"),
    "replacement": ("surrogate", "placeholder"),
    "stock": ("invented", "recombined", "look_alike"),
}
_RULE_RANGES = {"p": (0.0, 1.0), "k": (0, None), "shared_by": (1, None)}
_MEMBERS = {
    "pii.types": PII_TYPES,
    "lora.targets": ("qkv", "out", "up", "down"),
    "audit.sets": ("heldout", "web", "general", "discoverable"),
    "audit.metrics": AuditConfig.metrics,
    "study.budgets": ("epochs", "updates"),
}


def _rules(config: Config) -> typing.Iterator[str]:
    """Yield a line for each rule that does not hold."""

    def value(key: str) -> typing.Any:
        part: typing.Any = config
        for name in key.split("."):
            part = part[name] if isinstance(part, dict) else getattr(part, name)
        return part

    rules = ["masking", *(f"masking.types.{name}" for name in config.masking.types)]
    for key, allowed in (_CHOICES | {f"{r}.{k}": v for r in rules for k, v in _RULE_CHOICES.items()}).items():
        if value(key) not in allowed:
            yield f"{key} is {value(key)!r}: choose one of {', '.join(allowed)}{_nearest(str(value(key)), allowed)}"
    for key, allowed in _MEMBERS.items():
        for item in value(key):
            if item not in allowed:
                yield f"{key} has {item!r}: choose among {', '.join(allowed)}{_nearest(item, allowed)}"
        if not value(key) and key != "audit.metrics":
            yield f"{key} is empty: name at least one of {', '.join(allowed)}"
    for key, (low, high) in (_RANGES | {f"{r}.{k}": v for r in rules for k, v in _RULE_RANGES.items()}).items():
        number = value(key)
        if not (low <= number and (high is None or number <= high)):  # also catches NaN
            yield f"{key} is {number}: set it to {low} or more{'' if high is None else f', at most {high}'}"
    model, training = config.model, config.training
    yield from model_rules(model)
    if model.positions == "learned":
        for key, length in (
            ("training.sequence_length", training.sequence_length),
            ("audit.prompt_tokens + audit.new_tokens", config.audit.prompt_tokens + config.audit.new_tokens),
        ):
            if length > model.max_positions:
                yield (f"{key} is {length}, more than the model.max_positions {model.max_positions} that learned positions "
                       f"have: change one of them")  # fmt: skip
    least = min(model.width, model.mlp, model.heads * model.head_dim)
    if config.lora.rank >= least:
        yield f"lora.rank is {config.lora.rank}, not below the {least} rows of the smallest matrix: lower it, or set 0"
    if len(set(config.lora.targets)) < len(config.lora.targets):
        yield f"lora.targets is {list(config.lora.targets)}: name each matrix once"
    if training.sequence_length - config.masking.margin < 2:
        yield (f"masking.margin {config.masking.margin} leaves no room in training.sequence_length "
               f"{training.sequence_length}: lower the margin")  # fmt: skip
    if not training.steps and not training.epochs:
        yield "training.steps and training.epochs are both 0: set one of them"
    privacy = config.privacy
    if privacy.noise_multiplier and privacy.epsilon:
        yield "privacy.noise_multiplier and privacy.epsilon are both set: one follows from the other, set one to 0"
    if 0 < privacy.noise_multiplier < 0.1:
        yield f"privacy.noise_multiplier is {privacy.noise_multiplier}: below 0.1 it gives no privacy, raise it or set 0"
    if privacy.on and config.loss.elr_weight:
        yield "privacy (DP-SGD) and loss.elr_weight are both set: they do not work together here, set one of them to 0"
    if privacy.on and privacy.microbatch and training.batch_size % privacy.microbatch:
        yield (f"training.batch_size {training.batch_size} is not divisible by privacy.microbatch {privacy.microbatch}: "
               f"change one of them")  # fmt: skip
    if training.batch_size % training.accumulation:
        yield (f"training.batch_size {training.batch_size} is not divisible by training.accumulation "
               f"{training.accumulation}: change one of them")  # fmt: skip
    if 0 < training.skip_above <= 1:
        yield f"training.skip_above is {training.skip_above}: steps of average loss would be left out, set 0 or more than 1"
    if privacy.on and training.skip_above:
        yield "privacy (DP-SGD) and training.skip_above are both set: which steps are left out would tell of the data, set 0"
    if privacy.on and training.accumulation > 1:
        yield (f"training.accumulation is {training.accumulation} under privacy (DP-SGD), where privacy.microbatch does "
               f"the same: set that one, and training.accumulation=1")  # fmt: skip
    for number, part in enumerate(training.mix):
        if not part.data:
            yield f"training.mix.{number}.data is empty: name a folder that `rmft prepare` wrote, such as runs/NAME/data"
        if not 0 < part.weight < 1:
            yield f"training.mix.{number}.weight is {part.weight}: set it above 0 and below 1, a share of the sequences"
    if training.own_share <= 0:
        yield (f"training.mix has weights that add up to {sum(training.weights):g}, which leaves nothing for the run's own "
               f"data: lower them to less than 1 together")  # fmt: skip
    if privacy.on and training.mix:
        yield "privacy (DP-SGD) and training.mix are both set: the accountant knows one corpus alone, leave one of them out"
    if training.objective == "masked" and config.loss.elr_weight:
        yield "training.objective is masked and loss.elr_weight is set: they do not work together here, leave one out"
    if config.loss.elr_top and training.accumulation > 1:
        yield f"training.accumulation is {training.accumulation}, but loss.elr_top takes the batch as a whole: set it to 1"
    if config.loss.elr_top >= config.tokenizer.vocab_size:
        yield f"loss.elr_top {config.loss.elr_top} is not below tokenizer.vocab_size {config.tokenizer.vocab_size}: lower it"
    tracker, taken = config.tracker, ("all", "text", "pii", "surrogate", "canary")
    if privacy.on and tracker.enabled:
        yield "privacy (DP-SGD) and tracker.enabled are both set: what it counts is not noised, leave one out"
    if bool(tracker.tags) != bool(tracker.tag_names):
        yield "tracker.tags and tracker.tag_names go together: set both or neither"
    if len({*tracker.tag_names, *taken}) < len(tracker.tag_names) + len(taken):
        yield f"tracker.tag_names is {list(tracker.tag_names)}: give different names, none of {', '.join(taken)}"
    if config.source.format not in ("synthetic", "python_docs") and not config.source.path:
        what = {"tfds": "data set", "grain": "source"}.get(config.source.format, "file")
        yield f"source.path is empty: name the {config.source.format} {what}, or set source.format=synthetic"
    if config.source.format == "grain":
        for key, path in (("path", config.source.path), ("heldout_path", config.source.heldout_path)):
            if path and not re.fullmatch(r"[\w.]+:[\w.]+", path):
                yield f"source.{key} is {path!r}: name a grain source as package.module:object"
    yield from _pii_rules(config)
    canary = config.canary
    if canary.count and (min(canary.repetitions, default=0) < 1 or len(set(canary.repetitions)) < len(canary.repetitions)):
        yield (f"canary.repetitions is {list(canary.repetitions)}: give different numbers, each 1 or more, or set "
               f"canary.count=0")  # fmt: skip
    if canary.count and "email" not in config.pii.types:
        yield "canary.count is set, but pii.types has no email: canaries are addresses, add it or set canary.count=0"
    sizes = dataclasses.asdict(config.mesh)
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        named = " ".join(f"{name}={size}" for name, size in sizes.items())
        yield f"mesh is {named}: use positive sizes, -1 at most once"
    if "/" in config.name or config.name.startswith("."):
        yield f"name is {config.name!r}: a run's name is one directory name, without '/'"
    yield from mesh_faults(config, {name: max(1, size) for name, size in sizes.items()})


def mesh_faults(config: Config, sizes: dict[str, int]) -> typing.Iterator[str]:
    """Yield a line for each thing that does not split evenly over a mesh, with the setting to change and to what.

    sizes: of the axes replica, fsdp, tensor and context, all known.
    """
    model, rows = config.model, sizes["replica"] * sizes["fsdp"]
    microbatch, over = config.training.batch_size // config.training.accumulation, "mesh.replica x mesh.fsdp"
    split = (
        ("training.batch_size", config.training.batch_size, over, rows),
        ("training.batch_size / training.accumulation", microbatch, over, rows),
        ("training.sequence_length", config.training.sequence_length, "mesh.context", sizes["context"]),
        ("model.heads", model.heads, "mesh.tensor", sizes["tensor"]),
        ("model.kv_heads", model.groups, "mesh.tensor", sizes["tensor"]),
        ("the MLP's width (model.mlp_width)", model.mlp, "mesh.tensor", sizes["tensor"]),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, "mesh.tensor", sizes["tensor"]),
        ("model.width", model.width, "mesh.fsdp", sizes["fsdp"]),
    )
    for setting, value, axis, size in split:
        if value % size:
            near = " or ".join(str(n) for n in (value // size * size, -(-value // size) * size) if n)
            yield f"{setting} {value} is not divisible by the {size} devices of {axis}: use {near}, or change {axis}"


def model_rules(model: ModelConfig) -> typing.Iterator[str]:
    """Yield a line for each way in which the numbers of a model do not go together."""
    if not model.head_width and model.width % model.heads:
        yield f"model.width {model.width} is not divisible by model.heads {model.heads}: change one of them"
    elif model.positions == "rotary" and (model.rotated % 2 or not model.rotated):
        what = "model.width / model.heads" if not model.head_width else "model.head_width"
        share = "" if model.rotary_share == 1 else f", of which model.rotary_share leaves {model.rotated}"
        yield f"{what} is {model.head_dim}{share}: rotary positions need an even head width, change one of them"
    if model.heads % model.groups:
        yield f"model.heads {model.heads} is not divisible by model.kv_heads {model.kv_heads}: change one of them"


def _pii_rules(config: Config) -> typing.Iterator[str]:
    names = config.pii.names
    for name in config.masking.types:
        if name not in names:
            yield f"masking.types.{name} is set, but pii has the types {', '.join(names)}: add it, or leave it out"
    for number, custom in enumerate(config.pii.custom):
        where = f"pii.custom.{number}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", custom.name):
            yield f"{where}.name is {custom.name!r}: use lower-case letters, digits and underscores"
        if custom.name in PII_TYPES:
            yield f"{where}.name is {custom.name!r}, which is a built-in type: choose another one"
        if bool(custom.pattern) == bool(custom.words):
            yield f"{where} needs either a pattern or words, a file: give one of them"
        if custom.checksum not in ("none", "luhn", "mod97"):
            yield f"{where}.checksum is {custom.checksum!r}: choose one of none, luhn, mod97"
        try:
            re.compile(custom.pattern)
        except re.error as error:
            yield f"{where}.pattern {custom.pattern!r} is not a regular expression ({error}): mend it"
    if not names or len(set(names)) < len(names):
        yield f"pii has the types {', '.join(names) or 'none'}: name at least one, and each once"


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file (None = the defaults), apply `key.path=value` overrides and check everything.

    A top-level key `include` names files to take keys from (see `includes.read_tree`); as an override, relative to the
    current folder, its keys give way to all others.
    Raises UserError with one line for the first thing that is wrong: the file, an unknown key, a type, a rule.
    """
    tree, files = read_tree(as_path(path)) if path is not None else ({}, [])
    for override in reversed(overrides):
        if override.partition("=")[0].strip() == "include":
            below, more = read_includes(_value(override.partition("=")[2]), Path())
            tree, files = merge(below, tree), [*files, *more]
    where = " with ".join(map(str, files)) or "the defaults"
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"argument {override!r} is not an override: write key.path=value, such as seed=1")
        if key.strip() == "include":
            continue
        value = _value(text)
        _put(tree, key.strip().split("."), "" if value is None else value, override)
    return _build(Config, tree, "", where)


def with_changes(config: Config, changes: dict, where: str = "the changes") -> Config:
    """Return the config with nested keys changed, such as {"masking": {"policy": "all"}}; checked as when it is loaded."""
    return _build(Config, merge(to_dict(config), changes), "", where)


def to_dict(config: Config) -> dict:
    """Return the resolved config as plain nested dicts, ready for YAML or JSON."""
    return yaml.safe_load(yaml.safe_dump(plain(dataclasses.asdict(config))))


def first_difference(old: dict, new: dict, defaults: dict, prefix: str = "") -> str:
    """Return the first key whose value differs and how, '' if there is none.

    What `old` lacks, settings that came in after it was written, counts as it is in `defaults`.
    """
    for key, value in new.items():
        default = defaults.get(key)
        before = old.get(key, default)
        if isinstance(value, dict) and isinstance(before, dict):
            default = default if isinstance(default, dict) else {}
            if found := first_difference(before, value, default, f"{prefix}{key}."):
                return found
        elif before != value:
            return f"{prefix}{key} ({before!r}, not {value!r})"
    return ""


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def plain(value: typing.Any) -> typing.Any:
    """Return nested settings with lists in the place of tuples, as YAML and JSON give them back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _value(text: str) -> typing.Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(tree: dict, keys: list[str], value: typing.Any, override: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {key!r} is a value, not a section")
    tree[keys[-1]] = value


def _build(cls: type, tree: typing.Any, prefix: str, where: str) -> typing.Any:
    """Build the dataclass `cls` from a plain dict, naming the full key in every error."""
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')} in {where} is {tree!r}: it is a section, give it keys")
    types = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in types:
            raise UserError(f"unknown key {prefix}{key} in {where}{_nearest(str(key), types, prefix)}")
        if dataclasses.is_dataclass(types[key]):
            values[key] = _build(types[key], value, f"{prefix}{key}.", where)
        elif typing.get_origin(types[key]) is dict:
            values[key] = _build_mapping(typing.get_args(types[key])[1], value, tree, f"{prefix}{key}.", where)
        elif dataclasses.is_dataclass(item := next(iter(typing.get_args(types[key])), None)):
            items = value or []
            if not isinstance(items, (list, tuple)):
                raise UserError(f"{prefix}{key} in {where} is {value!r}: it must be a list of sections")
            cls_of = typing.cast(type, item)
            values[key] = tuple(_build(cls_of, one, f"{prefix}{key}.{n}.", where) for n, one in enumerate(items))
        else:
            values[key] = _convert(value, types[key], prefix + key, where)
    return cls(**values)


def _build_mapping(cls: typing.Any, items: typing.Any, general: dict, prefix: str, where: str) -> dict:
    """Build the values of a mapping. Fields that a dataclass in it leaves out are those of the section around it."""
    if not isinstance(items, dict):
        raise UserError(f"{prefix.rstrip('.')} in {where} is {items!r}: it is a section, give it keys")
    if cls is typing.Any:
        return items
    if cls is dict:
        for name, item in items.items():
            if not isinstance(item, dict):
                raise UserError(f"{prefix}{name} in {where} is {item!r}: it is a section, give it keys, or {{}}")
        return {str(name): item for name, item in items.items()}
    inherited = {key: value for key, value in general.items() if key in typing.get_type_hints(cls)}
    return {
        str(name): _build(cls, inherited | own if isinstance(own, dict) else own, f"{prefix}{name}.", where)
        for name, own in items.items()
    }


def _nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f" (did you mean {prefix}{close[0]}?)"
    return f": known keys are {', '.join(sorted(known))}" if prefix or isinstance(known, dict) else ""


def _convert(value: typing.Any, kind: typing.Any, key: str, where: str) -> typing.Any:
    """Take `value` as `kind` where no meaning is lost; a YAML 1.1 `1e-3` arrives as a string."""
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        items = value if isinstance(value, (list, tuple)) else [] if value in ("", None) else [value]
        if item_kind is float:
            items = [float(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in items]
        if all(isinstance(item, item_kind) and not isinstance(item, bool) for item in items):
            return tuple(items)
        what = {str: "strings, such as [a, b]", int: "whole numbers, such as [1, 2]", float: "numbers, such as [0.5, 1]"}
        raise UserError(f"{key} in {where} is {value!r}: it must be a list of {what[item_kind]}")
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise UserError(f"{key} in {where} is {value!r}: it must be {names[kind]}")
