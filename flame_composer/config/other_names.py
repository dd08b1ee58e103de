"""Other trainers' names for our keys, and the remedy that an unknown-key error then gives.

The trainers are flame, torchtitan, LLM Foundry, Composer, Hugging Face's and OLMo's. Names that are
spelled almost like ours are found without this table. A name is looked up with its section first
(`model.name`), then without it (`seq_len` for `training.seq_len`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_LAUNCHER = (
    "it is the launcher's (composer, torchrun or Slurm): see docs/migrating-from-flame.md, Several"
    " nodes"
)
_FSDP1 = "it is of torch's first FSDP; FSDP2 does without it"
_RESUMED = (
    "a run goes on from its newest whole checkpoint by itself (autoresume); to start from weights"
    " set model.pretrained"
)
_EVERY_STEP = "every step is logged"
_OF_MODEL = "keys of the model's class go under model.config"
_PIPELINE_PARALLEL = (
    "pipeline parallelism is not offered; parallelism.fsdp and parallelism.tensor spread a model"
    " over devices"
)


def _remedies(ours: Mapping[str, str], reasons: Mapping[str, str]) -> Mapping[str, str]:
    """Return the text to put after `unknown key; `, by the other trainers' name for the key.

    `ours` maps each of our keys to other names for it, separated by spaces. `reasons` maps such
    names to the text itself, for keys that have no equivalent here.
    """
    found = {name: reason for names, reason in reasons.items() for name in names.split()}
    return MappingProxyType(
        found
        | {name: f"did you mean {our}?" for our, names in ours.items() for name in names.split()}
    )


TRAINING = _remedies(
    {
        "context_length": (
            "context seq_len max_seq_len ctx_len context_len block_size sequence_length"
        ),
        "eval_batch_size": "device_eval_batch_size per_device_eval_batch_size",
        "eval_data.local or eval_data.remote": "eval_data.path",
        "eval_data": "eval_loader eval_dataset",
        "eval_interval": "eval_steps eval_freq eval_every eval_strategy evaluation_strategy",
        "eval_tasks": "icl_tasks",
        "global_batch_size": (
            "batch_size global_train_batch_size train_data.batch_size update"
            " gradient_accumulation_steps accumulation_steps"
        ),
        "log_folder": "logging_dir log_dir",
        "max_duration": (
            "steps max_steps num_steps train_steps epochs num_epochs num_train_epochs"
            " training.steps"
        ),
        "microbatch_size": (
            "batch device_train_microbatch_size per_device_train_batch_size training.batch_size"
            " micro_batch_size"
        ),
        "model.config": "model_config",
        "model.config.model_type": "model.name model.type architecture",
        "model.pretrained": (
            "model_name_or_path pretrained_model_name_or_path model.pretrained_model_name_or_path"
            " init_from"
        ),
        "on_nan": "skip_nan_inf",
        "optimizer.decay": "decay_norm_and_bias decay_embeddings no_decay_norm_and_bias",
        "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
        "optimizer.eps": "adam_epsilon epsilon",
        "optimizer.grad_clip_norm": (
            "norm max_norm grad_clip max_grad_norm clip_grad clip_grad_norm gradient_clipping"
        ),
        "optimizer.lr": "learning_rate peak_lr max_lr",
        "optimizer.name": "optim",
        "optimizer.weight_decay": "decay",
        "parallelism.activation_checkpointing": "activation_checkpoint gradient_checkpointing",
        "parallelism.activation_cpu_offload": "activation_offload",
        "parallelism.compile": "torch_compile compile_config",
        "parallelism.context": (
            "context_parallel_degree context_parallel_size sequence_parallel_size cp"
        ),
        "parallelism.fsdp": "fsdp_config parallelism_config data_parallel_shard_degree",
        "parallelism.fsdp.mixed_precision": "mixed_precision_param mixed_precision_reduce",
        "parallelism.fsdp.replicas": "data_parallel_replicate_degree dp_replicate num_replicas",
        "parallelism.fsdp.sharding_strategy": "fsdp_reshard_after_forward reshard_after_forward",
        "parallelism.tensor": (
            "tp tp_config tensor_parallel_degree tensor_model_parallel_size tensor_parallel_size"
        ),
        "parallelism.gradient_compression": "ddp_comm_hook comm_hook communication_data_type",
        "precision": "bf16 fp16 dtype",
        "repetition_filter": "instance_filter instance_filter_config",
        "repetition_filter.max_count": "repetition_max_count",
        "repetition_filter.max_period": "repetition_max_period",
        "repetition_filter.min_period": "repetition_min_period",
        "run_name or model.config.model_type": "type",
        "run_name, or train_data.local for data": "name",
        "run_name, save_folder or log_folder": "path dump_folder output_dir",
        "save_folder": "enable_checkpoint checkpoint.folder checkpoint_dir",
        "run_name": "wandb.name wandb.id",
        "save_interval": (
            "save save_steps save_freq save_strategy checkpoint.interval checkpoint_interval"
        ),
        "save_num_checkpoints_to_keep": "limit save_total_limit keep_latest_k",
        "scheduler.decay": "decay_ratio",
        "scheduler.min_lr_ratio": "lr_min min_lr alpha_f eta_min",
        "scheduler.name": "decay_type lr_scheduler_type lr_schedule optimizer.scheduler",
        "scheduler.t_max": "T_max",
        "scheduler.warmup": "warmup_steps t_warmup num_warmup_steps warmup_ratio",
        "seed": "global_seed random_seed",
        "stall_timeout": "train_timeout_seconds dist_timeout ddp_timeout",
        "tensorboard": "enable_tensorboard save_tb_folder",
        "tokenizer": "tokenizer_path tokenizer_name",
        "train_data": "train_loader dataloader train_dataset",
        "train_data.local or train_data.remote": (
            "data dataset cache data_dir data_path data_local data_remote train_data.path"
        ),
        "train_data.num_workers": "workers num_proc dataloader_num_workers",
        "train_data.prefetch_factor": "prefetch",
        "train_data.remote or train_data.streams": "dataset_name dataset_split data_files",
        "train_data.streams": "data_probs mixture weights",
        "wandb.project": "wandb_project enable_wandb report_to",
    },
    {
        "hidden_size num_hidden_layers num_layers n_layers num_heads n_heads vocab_size d_model"
        " attention_dropout": (_OF_MODEL),
        "nodes node gpus rank local_rank ip port nnodes nproc_per_node world_size num_gpus": (
            _LAUNCHER
        ),
        "sync_module_states limit_all_gathers use_orig_params forward_prefetch backward_prefetch"
        " flatten_parameters": (_FSDP1),
        "checkpoint load_path load_step resume resume_from_checkpoint": _RESUMED,
        "logging log_freq logging_steps log_interval console_log_interval": _EVERY_STEP,
        "pipeline_parallel_degree pipeline_model_parallel_size pp": _PIPELINE_PARALLEL,
        "config config_file": (
            "name the YAML file before all keys; what deepspeed's or accelerate's says is"
            " parallelism.fsdp here"
        ),
        "preprocessing": "text is made into rows beforehand, by convert/to_mds.py",
        "streaming": "data is always streamed from shards",
        "fused implementation foreach": "AdamW is always fused on GPUs",
        "drop_last packing_ratio train_data.split": (
            "rows are made, and held out for validation, by convert/to_mds.py"
        ),
        "eval_first": "the model is always evaluated before its first step",
        "float8 fp8": "float8 is not offered; precision is fp32, amp_bf16 or amp_fp16",
        "profiling profiler": (
            "profiling is not offered; callbacks.speed_monitor logs throughput and MFU"
        ),
        "push_to_hub hub_model_id": "it is convert/to_hf.py's",
        "t_max": "the schedule ends with the run, at max_duration",
        "use_cpu no_cuda device": (
            "a run takes the GPUs that its launcher gives it, and the CPU where there are none"
        ),
        "wandb.mode": "set WANDB_MODE=offline in the environment",
        "print_args": "the configuration is written beside the log and the checkpoints",
        "deepspeed deepspeed_config": (
            "ZeRO-2 is parallelism.fsdp.sharding_strategy=SHARD_GRAD_OP here, and ZeRO-3 is"
            " FULL_SHARD"
        ),
        "export_dtype": "it is dtype of convert/to_hf.py",
    },
)

# A plan has keys for machines as well, which in training only the launcher knows.
PLANNING = MappingProxyType(
    {
        **TRAINING,
        **_remedies(
            {
                "device": "gpu gpu_type",
                "devices": "gpus num_gpus nproc nproc_per_node",
                "nodes": "node nnodes num_nodes",
            },
            {},
        ),
    }
)

CONVERSION = _remedies(
    {
        "source": "dataset data path input",
        "context_length": "seq_len max_seq_len sequence_length concat_tokens block_size",
        "max_doc_length": "ctx_len",
        "out": "output out_root output_dir",
        "num_workers": "num_proc workers processes",
        "text_column": "text_key column text_field json_keys",
        "tokenizer": "model tokenizer_name tokenizer_path",
        "unit_size": "batch_size chunk_size",
    },
    {
        "return_offsets": "the borders of documents are in every row",
        "bos_text eos_text": "set add_bos and add_eos; the tokens are the tokenizer's",
    },
)

TUNING_DATA = _remedies(
    {
        "source": "dataset data path input dataset_dir file_name",
        "context_length": "cutoff_len seq_len max_seq_len max_seq_length max_length",
        "out": "output output_dir tokenized_path",
        "num_workers": "num_proc workers processes preprocessing_num_workers",
        "tokenizer": "model model_name_or_path tokenizer_path",
        "format": "formatting",
        "train_on": "train_on_prompt mask_history train_on_inputs assistant_only_loss",
        "too_long": "truncation cut",
        "val_fraction": "val_size",
        "val_datasets": "eval_dataset",
        "template": "chat_template prompt_template",
    },
    {
        "packing neat_packing": "examples are always packed, and never see one another",
        "max_samples num_samples": "every example is taken; give a smaller file",
        "bos_text eos_text": "the template says how an example begins and how answers end",
    },
)

EXTENSIONS = MappingProxyType(
    {
        "loggers.wandb": "set wandb.project instead",
        "loggers.tensorboard": "set tensorboard=true instead",
        "callbacks.hf_checkpointer": "set callbacks.hf_export={} instead",
    }
)
