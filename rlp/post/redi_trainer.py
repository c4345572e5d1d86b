"""TRL's DPO trainer with the loss of REDI, without a reference model, and with an alarm:

    from rlp.post.redi_trainer import RediTrainer

The class is made when it is asked for: TRL is imported then, and not with this module.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback

from rlp.post.redi import CollapseAlarm, CollapseError, departure, redi_loss, require_alpha

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig

Negative = Literal["all", "first_wrong", "after_wrong"]
NEGATIVES: tuple[Negative, ...] = Negative.__args__

_UNUSED = {"loss_type": ["sigmoid"], "ld_alpha": None, "use_weighting": False}
"""Of DPO's loss; anything else would do nothing here."""


def __getattr__(name: str) -> type:
    if name == "RediTrainer":
        return _redi_trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _redi_trainer() -> type:
    from trl import DPOTrainer

    return type("RediTrainer", (_Redi, DPOTrainer), {"__doc__": _Redi.__doc__})


class PairCollator:
    """A collator of TRL's for pairs, and which tokens of the rejected traces count."""

    def __init__(self, collator: Callable[[list[dict]], dict], max_length: int | None) -> None:
        self.collator, self.max_length = collator, max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds `negative_mask`, [N, P] int64, as long as `input_ids`."""
        output = self.collator(examples)
        mask = torch.zeros(len(examples), output["input_ids"].shape[1], dtype=torch.long)
        for row, one in zip(mask, examples):
            counted = ([0] * len(one["prompt_ids"]) + one["negative_mask"])[: self.max_length]
            row[: len(counted)] = torch.tensor(counted)
        return output | {"negative_mask": mask}


class _Redi:
    """Trains on rows {"prompt", "chosen", "rejected"} by `redi_loss`.

    It logs, in nats a token and as means over the steps since it last did, `redi/chosen_logprob`
    and `redi/rejected_logprob`, whole traces both, and `redi/negative_logprob`, of what counts of
    the second; `grad_norm` is logged by every trainer. The alarm looks at each thing that is
    logged, so `logging_steps` should be 1; what a resumed run has logged before counts.
    """

    _tag_names = ["trl", "redi"]
    _name = "REDI"

    def __init__(
        self,
        model: object,
        args: "DPOConfig",
        train_dataset: "Dataset",
        *,
        alpha: float = 0.8,
        negative: Negative = "all",
        alarm: CollapseAlarm | None = None,
        stop_on_collapse: bool = True,
        tell: Callable[[str], None] = print,
        **named: object,
    ) -> None:
        """
        Args:
            model: as TRL's trainers take it.
            alpha: weight of the wrong traces (`redi_loss`).
            negative: which tokens of a wrong trace are pushed down: `all`; `first_wrong`, the first
                that is not the right trace's (where rows have `first_wrong`, the token that holds
                this character of `rejected`); or `after_wrong`, all behind that one, which may be
                right where they stand. The term is a mean over them.
            alarm: None: one as it comes.
            stop_on_collapse: whether `train` ends with a CollapseError when the alarm fires, or
                tells and goes on.
            tell: gets what the alarm says, and what is left out of the rows.
            named: whatever else TRL's DPO trainer takes, but for a reference model.

        Raises:
            ValueError: alpha, negative, or settings of DPO that would do nothing; pairs that
                differ in nothing; no pair that fits into `max_length`.
        """
        require_alpha(alpha)
        if negative not in NEGATIVES:
            raise ValueError(f"negative must be one of {', '.join(NEGATIVES)}, got {negative!r}.")
        for name, value in _UNUSED.items():
            if getattr(args, name) != value:
                raise ValueError(f"{name} belongs to the loss of DPO; leave it out, or use that.")
        if args.truncation_mode != "keep_start":
            raise ValueError("truncation_mode must be keep_start: REDI counts from the prompt on.")
        self.alpha, self.negative, self.tell = alpha, negative, tell
        # A reference model is loaded unless its log-probabilities are computed before training,
        # which `_precompute_ref_logps` leaves out.
        args.precompute_ref_log_probs = True
        super().__init__(model=model, args=args, train_dataset=train_dataset, **named)
        self.data_collator = PairCollator(self.data_collator, args.max_length)
        self.add_callback(_Watch(alarm or CollapseAlarm(), stop_on_collapse, tell))

    # Rows

    def _precompute_ref_logps(self, dataset: "Dataset", name: str, batch_size: int) -> "Dataset":
        """There is no reference."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "negative_mask" not in self._signature_columns:
            self._signature_columns.append("negative_mask")

    def _prepare_dataset(
        self, dataset: "Dataset", processing_class: object, args: "DPOConfig", dataset_name: str
    ) -> "Dataset":
        from datasets import Dataset

        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"RediTrainer looks at every pair before it begins, and {type(dataset).__name__}"
                " can not be read twice. Give it a datasets.Dataset."
            )
        given = len(dataset)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if len(dataset) < given:
            self.tell(
                f"{given - len(dataset)} of {given} pairs are left out: their prompts alone are"
                f" {args.max_length} tokens (max_length) or longer."
            )
        if not len(dataset):
            raise ValueError(f"no pair is left: every prompt fills max_length {args.max_length}.")
        return dataset.add_column("negative_mask", self._masks(dataset, args.max_length))

    def _masks(self, dataset: "Dataset", max_length: int | None) -> list[list[int]]:
        """Which tokens of each rejected count; refuses pairs without a difference, or without a
        token that counts."""
        masks, equal, empty = [], [], []
        for number, row in enumerate(dataset, start=1):
            room = None if max_length is None else max_length - len(row["prompt_ids"])
            masks.append(self._negative_mask(row, room))
            if row["chosen_ids"][:room] == row["rejected_ids"][:room]:
                equal.append(number)
            elif not any(masks[-1]):
                empty.append(number)
        if equal:
            raise ValueError(
                f"{len(equal)} of {len(dataset)} pairs have a chosen and a rejected of the same"
                f" tokens within max_length {max_length}, the first of them pair {equal[0]}: there"
                " is nothing to learn from them. Leave them out, or raise max_length."
            )
        if empty:
            raise ValueError(
                f"negative={self.negative} finds no token in {len(empty)} of {len(dataset)} pairs,"
                f" the first of them pair {empty[0]}: all that the rejected has within max_length"
                f" {max_length} is right. Leave them out, or raise max_length."
            )
        return masks

    def _negative_mask(self, row: dict, room: int | None) -> list[int]:
        """Which tokens of a rejected count, 1 or 0, within what there is room for."""
        length = len(row["rejected_ids"][:room])
        first = self._first_wrong(row)
        return self.counted(length if first is None else min(first, length), length)

    def counted(self, first_wrong: int, length: int) -> list[int]:
        """Which of so many tokens of a rejected count, 1 or 0.

        Args:
            first_wrong: index of its first wrong token; `length` where there is none.
        """
        if self.negative == "all":
            return [1] * length
        if self.negative == "after_wrong":
            return [int(index > first_wrong) for index in range(length)]
        return [int(index == first_wrong) for index in range(length)]

    def _first_wrong(self, row: dict) -> int | None:
        """As the row says, else where it departs from the chosen."""
        character = row.get("first_wrong")
        if character is None:
            return departure(row["chosen_ids"], row["rejected_ids"])
        if not 0 <= character < len(row["rejected"]):
            raise ValueError(
                f"first_wrong must be the index of a character of rejected, 0 to"
                f" {len(row['rejected']) - 1}, got {character}."
            )
        right = self._tokenizer(row["prompt"] + row["rejected"][:character]).input_ids
        return departure(right[len(row["prompt_ids"]) :], row["rejected_ids"])

    # The loss

    def _compute_loss(self, model: object, inputs: dict, return_outputs: bool) -> object:
        mask = inputs["completion_mask"]
        named = {"use_cache": False}
        if self.aux_loss_enabled:
            named["output_router_logits"] = True
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"].masked_fill(mask == 0, -100),
            fused_lm_head=True,
            **named,
        )

        mask = mask[:, 1:].bool()
        logprob = outputs.log_probs[:, -mask.shape[1] :].masked_fill(~mask, 0.0)
        chosen, rejected = logprob.chunk(2)
        chosen_mask, rejected_mask = mask.chunk(2)
        counts = inputs["negative_mask"][:, 1:].bool()
        negative = rejected.masked_fill(~counts, 0.0)
        sums = chosen.sum(1), chosen_mask.sum(1), negative.sum(1), counts.sum(1)
        loss = redi_loss(*sums, self.alpha)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss

        self._note(
            {
                "chosen": chosen.sum(1) / chosen_mask.sum(1),
                "rejected": rejected.sum(1) / rejected_mask.sum(1),
                "negative": negative.sum(1) / counts.sum(1),
            }
        )
        return (loss, outputs) if return_outputs else loss

    def _note(self, logprobs: dict[str, torch.Tensor]) -> None:
        """Means over the pairs of all ranks, for what is logged next."""
        mode = "train" if self.model.training else "eval"
        values = torch.stack([value.detach() for value in logprobs.values()], dim=1)
        means = self.accelerator.gather(values).mean(dim=0).tolist()
        for name, mean in zip(logprobs, means):
            self._metrics[mode][f"redi/{name}_logprob"].append(mean)


class _Watch(TrainerCallback):
    """Shows the alarm what is logged."""

    def __init__(self, alarm: CollapseAlarm, stops: bool, tell: Callable[[str], None]) -> None:
        self.alarm, self.stops, self.tell, self.has_told = alarm, stops, tell, False

    def on_train_begin(self, args: object, state: object, control: object, **_: object) -> None:
        for told in state.log_history:  # of a run that is resumed
            if "redi/chosen_logprob" in told and self.alarm.see(told["redi/chosen_logprob"]):
                self.has_told = True

    def on_log(self, args: object, state: object, control: object, logs: dict, **_: object) -> None:
        if "redi/chosen_logprob" not in logs:
            return
        said = self.alarm.see(logs["redi/chosen_logprob"])
        if not said or (self.has_told and not self.stops):
            return
        said = f"collapse at step {state.global_step}: {said}"
        if "grad_norm" in logs:
            said += f"; the norm of the gradient is {logs['grad_norm']:.3g}"
        said += ". Lower alpha or the learning rate."
        if self.stops:
            raise CollapseError(said)
        self.has_told = True
        self.tell(said)
