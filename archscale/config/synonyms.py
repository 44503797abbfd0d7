"""What other libraries call our config keys: for the suggestion beside an unknown key."""

from __future__ import annotations

from typing import NamedTuple


class Synonym(NamedTuple):
    """A key that other libraries name otherwise.

    Attributes:
        key: dotted key of `archscale.config.Config`; empty where no key but an option of a command
            is meant.
        hint: how its value follows from the one meant, where they differ, or the option.
    """

    key: str
    hint: str = ""


_STEPS = "steps × training.batch_tokens"
_ACCUMULATION = "accumulation is batch_tokens / (micro_batch × model.context × devices)"
_RULE = "of matrices; optimizer.element.kind is the rule of all else"

# Meaning → names. A name with a dot applies in that section only.
_NAMES: dict[Synonym, str] = {
    Synonym("seed"): "random_seed rng_seed",
    Synonym(
        "model.depth"
    ): "n_layer n_layers num_layers num_hidden_layers layers n_blocks num_blocks",
    Synonym("model.width"): "hidden_size hidden_dim d_model dim embed_dim n_embd n_embed model_dim",
    Synonym("model.head_dim"): "d_head head_size",
    Synonym("model.heads"): "n_head n_heads num_heads num_attention_heads attention_heads",
    Synonym(
        "model.kv_heads"
    ): "n_kv_head n_kv_heads num_kv_heads num_key_value_heads n_query_groups",
    Synonym("model.mlp"): "activation hidden_act act_fn",
    Synonym(
        "model.mlp_ratio", "hidden features / width"
    ): "intermediate_size ffn_dim ffn_hidden_size d_ff",
    Synonym("model.context"): (
        "context_length context_size seq_len seq_length sequence_length max_seq_len "
        "max_seq_length max_position_embeddings block_size n_ctx n_positions"
    ),
    Synonym("model.vocab_size"): "vocab vocabulary n_vocab",
    Synonym("model.tied_embeddings"): "tie_embeddings tie_word_embeddings weight_tying",
    Synonym("model.rope_theta"): "rope_base",
    Synonym("model.window"): "sliding_window window_size",
    Synonym(
        "model.moe.sparsity", "expert slots / model.moe.top_k"
    ): "n_experts num_experts num_local_experts",
    Synonym("model.moe.top_k"): "num_experts_per_tok experts_per_token n_active_experts",
    Synonym("model.moe.balance_weight"): "aux_loss_weight router_aux_loss_coef",
    Synonym("parameterization.base.lr"): "lr learning_rate base_lr max_lr peak_lr",
    Synonym("optimizer.matrix.rule", _RULE): (
        "optim optimizer.name optimizer.type optimizer.kind optimizer.rule "
        "optimizer_type optimizer_name"
    ),
    Synonym("optimizer.weight_decay"): "weight_decay wd decay",
    Synonym("optimizer.element.betas", "[beta1, beta2]"): "betas beta1 beta2 adam_beta1 adam_beta2",
    Synonym("optimizer.element.eps"): "eps epsilon adam_eps adam_epsilon",
    Synonym("optimizer.grad_clip"): (
        "clip_grad clip_grad_norm grad_clip_norm gradient_clip gradient_clip_val "
        "gradient_clipping max_grad_norm"
    ),
    Synonym("schedule.kind"): "scheduler lr_schedule lr_scheduler lr_scheduler_type lr_decay_style",
    Synonym(
        "schedule.warmup_tokens", _STEPS
    ): "warmup warmup_steps warmup_iters num_warmup_steps lr_warmup_steps",
    Synonym("schedule.warmup_tokens", "ratio × training.tokens"): "warmup_ratio warmup_fraction",
    Synonym(
        "schedule.final_ratio", "relative to the peak"
    ): "min_lr min_lr_ratio final_lr final_lr_ratio",
    Synonym(
        "data.train"
    ): "dataset data_dir data_path train_data data.path data.dir data.name data.directory",
    Synonym("data.mixture"): "datasets data_mixture dataset_mixture data.sources data.datasets",
    Synonym("data.val"): "val_data valid_data validation_data data.validation data.valid data.eval",
    Synonym("training.tokens", _STEPS): (
        "steps max_steps n_steps num_steps train_steps total_steps training_steps "
        "train_iters max_iters iterations"
    ),
    Synonym(
        "training.tokens", "epochs × tokens of the data set, which `archscale data inspect` prints"
    ): "epochs epoch n_epochs num_epochs max_epochs num_train_epochs",
    Synonym(
        "training.tokens"
    ): "max_tokens n_tokens num_tokens total_tokens train_tokens token_budget",
    Synonym(
        "training.batch_tokens", "sequences × model.context"
    ): "batch batch_size global_batch_size train_batch_size total_batch_size",
    Synonym("training.batch_tokens", _ACCUMULATION): (
        "accumulation grad_accum grad_accum_steps "
        "gradient_accumulation gradient_accumulation_steps accumulate_grad_batches"
    ),
    Synonym("training.micro_batch"): (
        "micro_batch_size microbatch device_batch_size per_device_batch_size "
        "per_device_train_batch_size train_micro_batch_size_per_gpu"
    ),
    Synonym("training.precision"): "dtype bf16 fp16 fp32 mixed_precision amp torch_dtype",
    Synonym("training.compile"): "torch_compile",
    Synonym(
        "training.activation_checkpoint"
    ): "activation_checkpointing gradient_checkpointing recompute",
    Synonym("parallel.zero_stage"): "zero zero_optimization",
    Synonym("parallel.shard"): "fsdp data_parallel_shard_degree dp_shard",
    Synonym("parallel.replicate"): "ddp data_parallel_replicate_degree dp_replicate",
    Synonym(
        "parallel.expert"
    ): "expert_parallel ep ep_size expert_parallel_size expert_model_parallel_size",
    Synonym(
        "checkpoint.every", "in steps"
    ): "save_every save_interval save_steps checkpoint_every checkpoint.interval",
    Synonym("checkpoint.keep"): "save_total_limit keep_last keep_last_n",
    Synonym("eval.every", "in steps"): "eval_every eval_interval eval_steps val_every val_interval",
    Synonym("eval.batches"): "eval_iters eval_batches val_batches",
    Synonym("telemetry.every", "in steps"): "log_every log_interval logging_steps",
    Synonym("telemetry.wandb.mode"): "use_wandb report_to",
    Synonym("telemetry.tensorboard"): "use_tensorboard log_to_tensorboard",
    Synonym("telemetry.wandb.project"): "wandb_project",
    Synonym("", "the option --run-dir of archscale train"): "output_dir out_dir save_dir run_dir",
    Synonym(
        "", "the option --resume of archscale train"
    ): "resume resume_from resume_from_checkpoint",
}
SYNONYMS = {name: meant for meant, names in _NAMES.items() for name in names.split()}


def synonym(dotted: str) -> Synonym | None:
    """What an unknown key probably means; of names for its last parts the longest counts."""
    parts = dotted.lower().replace("-", "_").split(".")
    for length in (2, 1):
        if meant := SYNONYMS.get(".".join(parts[-length:])):
            return meant
    return None
