"""What other projects call the keys and values of a profile, for suggestions."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMES: Mapping[str, str] = {
    "model.d_model": "hidden_size n_embd n_embed dim embed_dim embedding_dim embedding_size width "
    "model_dim d_embed emb_dim",
    "model.num_heads": "n_head n_heads num_attention_heads heads nheads",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads kv_heads num_query_groups",
    "model.num_layers": "n_layer n_layers num_hidden_layers depth layers num_blocks n_blocks "
    "nlayers",
    "model.d_ff": "intermediate_size ffn_dim mlp_dim hidden_dim d_inner n_inner ffn_hidden_size "
    "dim_feedforward feedforward_dim ff_dim",
    "model.vocab_size": "n_vocab vocabulary_size num_embeddings padded_vocab_size",
    "model.max_seq_len": "seq_len seq_length sequence_length sequence_len seqlen block_size n_ctx "
    "n_positions context_length context_size context_window ctx_len max_position_embeddings "
    "max_seq_length max_sequence_length max_context",
    "model.dropout": "dropout_rate dropout_p resid_pdrop attn_pdrop embd_pdrop hidden_dropout "
    "hidden_dropout_prob attention_dropout attention_probs_dropout_prob",
    "model.tie_embeddings": "tie_word_embeddings weight_tying tied_embeddings tie_weights "
    "share_embeddings",
    "model.logits_soft_cap": "final_logit_softcapping logit_softcap logit_soft_cap softcap",
    "model.attention_name": "attention attn attn_implementation attention_type attention_impl "
    "flash flash_attn flash_attention use_flash_attn use_flash_attention attn_type",
    "model.attention_pattern": "layer_types attention_layers layer_pattern",
    "model.ffn_name": "ffn mlp hidden_act activation activation_function mlp_type feed_forward",
    "model.norm_name": "norm_type normalization normalisation layer_norm",
    "model.position_name": "position positions position_embedding_type positional_encoding pos_emb "
    "position_embedding",
    "model.rope.theta": "rope_theta rope_base rotary_base",
    "model.rope.scaling": "rope_scaling rope_parameters rope_scaling_factor",
    "model.norm.eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps rmsnorm_eps",
    "model.mha.head_dim": "head_size d_head d_kv kv_channels",
    "model.tva.qk_norm": "qk_layernorm use_qk_norm",
    "model.moe.experts": "num_experts n_experts num_local_experts n_routed_experts",
    "model.moe.top_k": "num_experts_per_tok experts_per_token moe_top_k",
    "model.moe.capacity": "capacity_factor expert_capacity",
    "model.moe.balance_loss": "router_aux_loss_coef aux_loss_coef load_balancing_loss",
    "training.batch_size": "batch bs bsz micro_batch_size train_batch_size device_batch_size "
    "per_device_train_batch_size per_gpu_train_batch_size batchsize",
    "training.max_epochs": "epochs n_epochs num_epochs num_train_epochs epoch",
    "training.max_steps": "steps n_steps num_steps max_iters iters iterations num_iterations "
    "train_steps num_train_steps max_train_steps total_steps train_iters",
    "training.max_tokens": "tokens num_tokens train_tokens token_budget",
    "training.max_seconds": "max_time time_limit timeout max_duration",
    "training.early_stopping_patience": "patience early_stopping",
    "training.early_stopping_min_delta": "min_delta early_stopping_threshold",
    "training.grad_accum_steps": "gradient_accumulation_steps gradient_accumulation grad_accum "
    "accumulate_grad_batches accum_steps accumulation_steps",
    "training.learning_rate": "lr max_lr peak_lr base_lr initial_lr",
    "training.min_lr_ratio": "min_lr lr_min eta_min min_learning_rate final_lr lr_end",
    "training.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio",
    "training.decay_ratio": "cooldown_frac cooldown decay_frac num_decay_steps",
    "training.weight_decay": "wd l2",
    "training.betas": "beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    "training.eps": "epsilon adam_epsilon adam_eps",
    "training.gradient_clip": "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip_val "
    "gradient_clipping grad_norm_clip max_norm clip",
    "training.optimizer_name": "optimizer optimiser optim optimizer_type",
    "training.lr_schedule_name": "scheduler lr_scheduler lr_scheduler_type lr_schedule decay_lr "
    "lr_decay_style schedule_type",
    "training.ema_decay": "ema use_ema ema_rate",
    "training.mixed_precision": "bf16 fp16 amp use_amp precision dtype torch_dtype autocast half",
    "training.compile": "torch_compile compile_model use_compile",
    "training.seed": "random_seed manual_seed rng_seed",
    "training.save_every_steps": "save_steps save_interval save_every checkpoint_every "
    "checkpoint_interval ckpt_interval every_n_train_steps",
    "training.keep_last": "save_total_limit save_top_k max_checkpoints keep_checkpoints",
    "training.checkpoint_dir": "output_dir out_dir ckpt_dir save_dir default_root_dir "
    "checkpoint_path",
    "training.log_every_steps": "logging_steps log_interval log_every log_every_n_steps log_freq",
    "data.train_path": "dataset datasets data_path train_file train_files train_data data_dir "
    "dataset_path input_file corpus training_data",
    "data.val_path": "val_file validation_file validation_path val_data eval_file eval_data "
    "test_path valid_path",
    "data.tokenizer_name": "tokenizer_type",
    "data.tokenizer.path": "tokenizer_path tokenizer_model tokenizer_file",
    "data.num_workers": "dataloader_num_workers num_data_workers",
    "data.packing": "pack packed sample_packing",
    "data.val_fraction": "val_split validation_split eval_split test_size val_ratio split",
    "data.max_val_chars": "max_eval_samples max_val_samples max_val_tokens val_tokens eval_tokens "
    "val_size",
    "data.deduplicate": "dedup deduplication",
    "data.loader": "data_loader dataloader reader format data_format file_format dataset_format",
    "data.columns": "text_column text_field dataset_text_field text_key prompt_column fields",
    "data.errors": "encoding encoding_errors",
    "data.normalize": "unicode_normalization",
    "data.mixture": "datasets_mixture blend data_mix mix data_mixture",
    "evaluation.metrics": "metric",
    "evaluation.eval_freq": "eval_interval eval_steps eval_every val_check_interval eval_frequency",
    "evaluation.eval_batches": "eval_iters limit_val_batches max_eval_batches num_eval_batches",
    "evaluation.save_best": "load_best_model_at_end save_best_model keep_best",
    "evaluation.sample_tokens": "max_new_tokens sample_length num_sample_tokens",
    "evaluation.sample_temperature": "temperature",
    "monitoring.wandb.enabled": "wandb_log use_wandb report_to",
    "monitoring.wandb.project": "wandb_project project_name",
    "monitoring.tensorboard.log_dir": "tensorboard_dir logging_dir tb_dir",
    "hardware.device": "device_type accelerator",
    "hardware.num_gpus": "gpus n_gpu n_gpus ngpus num_devices devices world_size nproc_per_node",
    "hardware.distributed": "ddp fsdp strategy data_parallel distributed_type",
    "hardware.num_threads": "threads n_threads cpu_threads omp_num_threads",
    "hardware.backend": "dist_backend ddp_backend distributed_backend",
    "debug.log_level": "loglevel logging_level verbosity",
    "debug.check_gradients": "detect_anomaly",
    "trainable.stages.freeze": "frozen freeze_layers frozen_layers freeze_modules",
    "trainable.stages.thaw": "unfreeze unfrozen unfreeze_layers unfreeze_modules train",
    "plugins": "plugin extensions callbacks",
    "schedules": "schedule curriculum",
}

_VALUES: Mapping[str, Mapping[str, str]] = {
    "attention": {
        "flash_v2": "flash flash_attn flash_attention flash_attention_2 flash2",
        "linear_causal": "linear linear_attention gated_deltanet deltanet gdn gated_delta_rule",
        "mha": "sdpa eager vanilla standard multihead multi_head gqa mqa grouped full",
        "tva_default": "tva default",
    },
    "ffn": {
        "default": "swiglu silu swish llama glu gated",
        "gelu": "mlp gelu_new gelu_tanh gpt2",
        "relu2": "relu relu_squared squared_relu",
    },
    "norm": {"rmsnorm": "rms rms_norm", "layernorm": "layer_norm ln layer"},
    "position": {
        "rope": "rotary rotary_embedding default",
        "learned": "absolute learned_absolute embedding",
        "none": "nope no null false",
    },
    "optimizer": {"adamw": "adam adamw_torch adamw_torch_fused adamw_fused adam_w"},
    "lr_schedule": {
        "cosine": "cosine_with_warmup cosine_annealing cosine_decay onecycle",
        "linear": "linear_with_warmup linear_decay",
        "wsd": "warmup_stable_decay trapezoidal trapezoid",
        "constant": "constant_with_warmup none flat",
    },
    "tokenizer": {"byte": "bytes char character utf8 utf_8"},
    "dataset": {
        "text_default": "text txt file files folder",
        "jsonl": "json ndjson json_lines jsonlines",
        "csv": "tsv table",
        "parquet": "pq arrow",
        "python_source": "python code stdlib",
    },
    "backbone": {"gpt": "transformer decoder gpt2 llama"},
    "hardware.device": {
        "cpu": "cpu:0 cpu0",
        "cuda": "gpu nvidia",
        "cuda:0": "cuda0 gpu0 gpu:0",
        "mps": "metal apple",
    },
    "hardware.distributed": {"ddp": "distributed_data_parallel dp", "fsdp": "fsdp2 zero zero3"},
    "training.mixed_precision": {
        "true": "bf16 bfloat16 fp16 float16 half amp bf16-mixed 16-mixed on yes",
        "false": "fp32 float32 full 32-true no off none",
    },
}
"""Synonyms of values, by kind of provider or by key."""


def _reversed(words: Mapping[str, str]) -> dict[str, str]:
    return {word: ours for ours, others in words.items() for word in others.split()}


_KEYS = _reversed(_NAMES)


def plain_word(word: str) -> str:
    """``learningRate``, ``learning-rate`` and ``LEARNING_RATE`` are one."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).replace("-", "_").lower()


def key_meant(word: str) -> str:
    """The dotted key that other projects call ``word``, or an empty string.

    >>> key_meant("n_embd"), key_meant("learningRate"), key_meant("lr")
    ('model.d_model', '', 'training.learning_rate')
    """
    return _KEYS.get(plain_word(word), "")


def value_meant(of: str, word: str) -> str:
    """The value that other projects call ``word``: of a kind of provider, or of a key.

    >>> value_meant("attention", "flash"), value_meant("hardware.device", "gpu")
    ('flash_v2', 'cuda')
    """
    known = _reversed(_VALUES.get(of, {}))
    return known.get(word.lower(), "") or known.get(plain_word(word), "")


def table() -> tuple[Mapping[str, str], Mapping[str, Mapping[str, str]]]:
    """Every key and value here, with what others call it, separated by spaces."""
    return _NAMES, _VALUES
