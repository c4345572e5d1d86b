"""What a step runs through the model, in closed form from the settings: tokens, pairs, head
rows."""

from dataclasses import dataclass, replace

from rlp.config import Config, ConfigError, PositionConfig
from rlp.model.shapes import ModelShapes, Work, forward_flops, row_work
from rlp.sampling.schedule import num_slots, trunk_places


@dataclass(frozen=True, slots=True)
class FormatTokens:
    """Tokens of the thought format."""

    open: int = 1
    """O."""
    close: int = 1
    """E."""
    instruction: int = 0
    """I."""


QWEN3_TOKENS = FormatTokens()
"""Without an instruction."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """How large the pieces of one step are, whatever the layout."""

    documents: int
    """B, over all ranks."""
    document_tokens: int
    """P."""
    thought_tokens: int
    """L."""
    horizon: int
    """H."""
    predicts: bool
    """Whether a prediction of H tokens is sampled after each thought."""
    format_tokens: FormatTokens
    per_document: int
    """K; 0 where the run does not think."""
    group_size: int
    """G."""
    thoughts_per_forward: int
    """g, at most G."""
    lm: bool
    """Whether the first forward pass of a micro-batch has its documents in it, for the LM loss."""
    micro_batch_documents: int
    """Documents of one forward pass on one rank, at most."""
    tokens_per_micro_batch: int | None
    """Token positions, and rows of the LM head, of that pass at most; None: no limit."""
    slots: int
    """Thoughts that grow side by side on one rank."""
    held_documents: int
    """Documents that a rank holds behind them, where thoughts share the keys of a document."""
    held_positions: int
    """Positions whose context it holds to copy into them, where they do not."""

    @classmethod
    def of(
        cls, config: Config, world_size: int, format_tokens: FormatTokens, *, layout: str
    ) -> "StepSizes":
        """
        Raises:
            ConfigError: documents are too short for the positions asked for, or one of the longest
                is more than a micro-batch, however it is cut.
        """
        group = config.thought.group_size
        documents = ceil_div(config.optim.batch_size, world_size)
        per_document = positions_per_document(config) if config.objective.thinks else 0
        limit = config.optim.tokens_per_micro_batch
        slots, held = slots_and_trunks(config.sampling.slots, documents, per_document * group)
        sizes = cls(
            documents=config.optim.batch_size,
            document_tokens=config.data.max_document_tokens,
            thought_tokens=config.thought.max_thought_tokens,
            horizon=config.target.horizon,
            predicts=config.reward.predicts and config.objective.thinks,
            format_tokens=format_tokens,
            per_document=per_document,
            group_size=group,
            thoughts_per_forward=min(config.optim.thoughts_per_forward or group, group),
            lm=config.objective.lm_weight > 0,
            micro_batch_documents=(
                documents if limit else min(config.optim.micro_batch_size, documents)
            ),
            tokens_per_micro_batch=limit,
            slots=slots,
            held_documents=held,
            held_positions=trunk_places(slots, group, documents * per_document, lasting=False),
        )
        return sizes if limit is None else _cut(sizes, limit, layout)

    @property
    def positions(self) -> int:
        """B K, over all ranks."""
        return self.documents * self.per_document

    @property
    def thoughts(self) -> int:
        """N = B K G, over all ranks."""
        return self.positions * self.group_size

    @property
    def context_tokens(self) -> int:
        """I + P - H, what a thought stands behind."""
        return self.format_tokens.instruction + self.document_tokens - self.horizon

    @property
    def branch_tokens(self) -> int:
        """O + L + E + H - 1, what a thought adds to it in the update: the last target is predicted
        and never read."""
        return (
            self.format_tokens.open
            + self.thought_tokens
            + self.format_tokens.close
            + self.horizon
            - 1
        )

    @property
    def decoded_tokens(self) -> int:
        """O + L - 1, what a thought adds to it while sampling: its last token is drawn and not
        run. With a prediction, O + L + E + H - 1."""
        told = self.format_tokens.close + self.horizon if self.predicts else 0
        return self.format_tokens.open + self.thought_tokens + told - 1

    @property
    def scored(self) -> int:
        """Real targets that are scored at a position (`ThoughtFormat.scored`)."""
        return 1 if self.predicts else self.horizon

    @property
    def thought_queries(self) -> int:
        """Rows of the LM head of a thought: its tokens, those of its prediction, and targets."""
        return self.thought_tokens + self.predicts * self.horizon + self.scored

    @property
    def document_queries(self) -> int:
        """Rows of the LM head in the pass of the LM loss: P - 1, and beside thoughts H targets and
        an open marker per position."""
        return self.document_tokens - 1 + self.per_document * (self.scored + 1)

    @property
    def slices(self) -> int:
        """Forward passes that a group takes."""
        return ceil_div(self.group_size, self.thoughts_per_forward)


def _cut(sizes: StepSizes, limit: int, layout: str) -> StepSizes:
    """With as many thoughts of each group in a forward as fit with the longest document, whose
    thoughts all go to the end of their budget.

    Raises:
        ConfigError: not even one thought at each of its positions does.
    """
    least = longest_document_tokens(sizes, layout, 1)
    if least > limit:
        thinks = sizes.per_document > 0
        raise too_small(limit, least, "one of the longest documents", thinks=thinks)
    fit = sizes.group_size
    while longest_document_tokens(sizes, layout, fit) > limit:
        fit -= 1
    return replace(sizes, thoughts_per_forward=fit)


def longest_document_tokens(sizes: StepSizes, layout: str, thoughts: int) -> int:
    """What `optim.tokens_per_micro_batch` must be for the longest document in one forward with so
    many thoughts of each group, the longest too."""
    alone = replace(
        sizes, micro_batch_documents=1, thoughts_per_forward=thoughts, tokens_per_micro_batch=None
    )
    return max(forward_tokens(alone, layout), forward_queries(alone))


def too_small(limit: int, needed: int, what: str, *, thinks: bool) -> ConfigError:
    """`optim.tokens_per_micro_batch` does not hold the least that can be run by itself.

    Args:
        what: that is.
    """
    smaller = "data.max_document_tokens"
    if thinks:
        what += " with one thought at each of its positions"
        smaller += ", thought.max_thought_tokens or position.per_document"
    return ConfigError(
        f"optim.tokens_per_micro_batch is {limit:,}, and {what} takes {needed:,} token positions in"
        f" one forward. Write optim.tokens_per_micro_batch={needed} or more, a smaller {smaller},"
        " or optim.tokens_per_micro_batch=null."
    )


def slots_and_trunks(slots: int, documents: int, thoughts_of_each: int) -> tuple[int, int]:
    """Slots, and places for documents behind them, that so many documents are sampled in."""
    slots = num_slots(slots, documents * thoughts_of_each)
    return slots, trunk_places(slots, max(1, thoughts_of_each), documents, lasting=True)


def forward_tokens(sizes: StepSizes, layout: str) -> int:
    """Token positions of the largest forward pass of the update on one rank, padding included, per
    document of the micro-batch:

    repeated    K g rows, and one for the LM loss, all padded to the longest, context + branch
    tree        K g branches, and the trunk: the document where the LM loss runs it, else the
                context; with an instruction these are two trunks

    and never more than `tokens_per_micro_batch`.
    """
    tokens = sizes.micro_batch_documents * _document_tokens(sizes, layout)
    return min(tokens, sizes.tokens_per_micro_batch or tokens)


def _document_tokens(sizes: StepSizes, layout: str) -> int:
    """Of a document, in a forward pass of the longest."""
    branches = sizes.per_document * sizes.thoughts_per_forward
    if layout == "repeated":
        row = sizes.context_tokens + sizes.branch_tokens if branches else sizes.document_tokens
        return (branches + sizes.lm) * row
    trunks = (
        sizes.lm * sizes.document_tokens
        + _context_trunks(sizes, lm=sizes.lm) * sizes.context_tokens
    )
    return trunks + branches * sizes.branch_tokens


def _context_trunks(sizes: StepSizes, *, lm: bool) -> int:
    """Trunks of its own (1 or 0) that a document needs for its thoughts: without an instruction
    they share that of the LM loss."""
    shared = lm and sizes.format_tokens.instruction == 0
    return int(sizes.per_document > 0 and not shared)


def forward_queries(sizes: StepSizes) -> int:
    """Rows of the LM head in that pass: those of each thought, and those of the LM loss."""
    thoughts = sizes.per_document * sizes.thoughts_per_forward
    queries = sizes.micro_batch_documents * (
        thoughts * sizes.thought_queries + sizes.lm * sizes.document_queries
    )
    return min(queries, sizes.tokens_per_micro_batch or queries)


def positions_per_document(config: Config, position: PositionConfig | None = None) -> int:
    """K; for `all`, every position of the longest document that has a prefix and a target.

    Args:
        position: of the held-out panel; None: of the run.
    """
    position = position or config.position
    possible = (
        config.data.max_document_tokens - config.target.horizon - position.min_prefix_tokens + 1
    )
    if position.per_document == "all":
        return possible
    if position.per_document > possible:
        raise ConfigError(
            "position.per_document: a document of"
            f" data.max_document_tokens={config.data.max_document_tokens} has {possible} positions,"
            f" got {position.per_document}. Write position.per_document=all or a longer document."
        )
    return position.per_document


def ceil_div(amount: int, parts: int) -> int:
    return -(-amount // parts)


def step_flops(
    config: Config,
    shapes: ModelShapes,
    ranks_world_size: int,
    *,
    layout: str,
    format_tokens: FormatTokens = QWEN3_TOKENS,
) -> dict[str, float]:
    """FLOPs of one step by ledger phase, over all ranks, as the ledger counts them.

    `score` is the document pass that the selectors entropy and surprisal need, and one of yours
    may, and for groups in slices (`optim.thoughts_per_forward`) one pass over the thoughts ahead of
    the update, and for documents by their lengths in as many slices as the longest need: the
    targets after whole groups are read off the update's own forward pass and cost
    the head rows counted there. A placebo scores thoughts ahead too: those of all positions where
    they are foreign, or rewards are shuffled in documents that are put together by their lengths,
    and those of each rank's last position where rewards are shuffled otherwise. `teacher` is
    one document pass for all positions, on the steps that score the baseline, and with a KL term
    one pass of the starting checkpoint over all that the update runs. `train` and `lm` are a
    forward and a backward pass for each update with the same thoughts.
    """
    sizes = StepSizes.of(config, ranks_world_size, format_tokens, layout=layout)
    thinks, updates = config.objective.thinks, config.optim.updates_per_rollout
    selects = thinks and config.position.selector not in ("uniform", "marker")
    score = _times_ahead(config, sizes, ranks_world_size) * forward_flops(
        shapes, thought_work(sizes, layout, lm=False)
    )
    if selects:
        queries = sizes.documents * (sizes.document_tokens - 1)
        document_pass = row_work(sizes.document_tokens, queries, count=sizes.documents)
        score += forward_flops(shapes, document_pass)

    update = {
        "train": forward_flops(shapes, thought_work(sizes, layout, lm=sizes.lm)),
        "lm": forward_flops(shapes, document_work(sizes, layout)),
    }
    teacher = 0.0
    if thinks and config.baseline.kind != "none":
        queries = sizes.positions * (sizes.scored + 1)
        no_think = row_work(sizes.document_tokens, queries, count=sizes.documents)
        teacher += forward_flops(shapes, no_think) / config.baseline.every_n_steps
    if config.objective.kl_weight > 0:
        teacher += updates * sum(update.values())

    return {
        "prefill": forward_flops(shapes, _prefill_work(sizes, layout)),
        "decode": forward_flops(shapes, _decode_work(sizes)),
        "score": score,
        "teacher": teacher,
        **{phase: 3 * updates * flops for phase, flops in update.items()},
    }


def _times_ahead(config: Config, sizes: StepSizes, world_size: int) -> float:
    """Passes over the thoughts ahead of the update."""
    placebo = config.reward.placebo if config.objective.thinks else "none"
    if placebo == "shuffled_reward" and sizes.tokens_per_micro_batch:
        return 1.0
    times = float(sizes.slices > 1 or placebo == "foreign_thought")
    if placebo == "shuffled_reward":
        times += world_size / sizes.positions
    return times


def _prefill_work(sizes: StepSizes, layout: str) -> Work:
    """What runs before the first token of a thought is drawn:

    repeated    the context of each position
    tree        the context of each document

    and in both the open marker in every thought.
    """
    opening, context = sizes.format_tokens.open, sizes.context_tokens
    trunks = sizes.positions if layout == "repeated" else sizes.documents
    return row_work(context, 0, count=trunks) + row_work(
        opening, sizes.thoughts * opening, before=context, count=sizes.thoughts
    )


def _decode_work(sizes: StepSizes) -> Work:
    """Each token of a thought but the last, and of its prediction, behind its prefix."""
    run = sizes.decoded_tokens - sizes.format_tokens.open
    prefix = sizes.context_tokens + sizes.format_tokens.open
    return row_work(run, sizes.thoughts * run, before=prefix, count=sizes.thoughts)


def thought_work(sizes: StepSizes, layout: str, *, lm: bool) -> Work:
    """One forward over all thoughts.

    repeated    N rows of context + branch tokens
    tree        N branches that see a context before them, and the context of each document in every
                slice of its groups; with the LM loss (`lm`) the trunks of the first slice belong to
                that
    """
    head_rows = sizes.thoughts * sizes.thought_queries
    context, branch = sizes.context_tokens, sizes.branch_tokens
    if layout == "repeated":
        return row_work(context + branch, head_rows, count=sizes.thoughts)
    trunks = sizes.documents * (sizes.slices - lm) * _context_trunks(sizes, lm=False)
    return row_work(branch, head_rows, before=context, count=sizes.thoughts) + row_work(
        context, 0, count=trunks
    )


def document_work(sizes: StepSizes, layout: str) -> Work:
    """One forward of the LM loss: the documents, where there is such a loss, and in a tree with an
    instruction their contexts.

    Beside thoughts this pass also gives the policy's no-think log-probabilities.
    """
    if not sizes.lm:
        return Work()
    queries = sizes.documents * sizes.document_queries
    documents = row_work(sizes.document_tokens, queries, count=sizes.documents)
    contexts = sizes.documents * _context_trunks(sizes, lm=True) if layout == "tree" else 0
    return documents + row_work(sizes.context_tokens, 0, count=contexts)
