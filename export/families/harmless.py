"""Fields of config.json that change no forward pass: what transformers ignores, or uses for anything but the maths.

Source: transformers 5.24 `configuration_utils.py` and `generation/configuration_utils.py`, and the base class of
transformers 4, which wrote its defaults into every file.
"""

# How the configuration was made and is labelled.
_BOOKKEEPING = (
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map"),
    *("model_type", "_auto_class", "tokenizer_class", "processor_class", "finetuning_task", "task_specific_params"),
    *("problem_type", "id2label", "label2id", "num_labels", "prefix"),
)
# How the same numbers are computed, and what is returned beside them.
_COMPUTATION = (
    *("dtype", "torch_dtype", "_pre_quantization_dtype", "use_bfloat16", "torchscript", "tf_legacy_loss", "use_cache"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("_flash_attn_2_enabled", "chunk_size_feed_forward", "is_encoder_decoder", "return_dict", "use_return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "tie_last_hidden_states"),
    *("base_model_tp_plan", "base_model_ep_plan", "base_model_pp_plan", "base_model_fsdp_plan"),
    *("mamba_ssm_dtype",),  # of states, which are float32 here
    *("ep_size", "pretraining_tp"),  # of how many devices
)
# How weights are stored, which `export/checkpoint/quantized` reads wherever it stands.
_STORAGE = ("quantization_config", "compression_config")
# Of training alone; those that predict further tokens describe layers that transformers leaves out.
_TRAINING = (
    *(
        "initializer_range",
        "router_aux_loss_coef",
        "aux_loss_alpha",
        "seq_aux",
        "router_jitter_noise",
        "gradient_checkpointing",
    ),
    *("num_nextn_predict_layers", "num_mtp_layers", "for_llm_compressor"),
    *("debug", "micro_forward", "skip_checkpoint", "use_deepep"),  # of XTuner's, with which InternVL was trained
    *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
    *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
)
# Of generate(); transformers drops them from config.json.
_GENERATION = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "num_assistant_tokens", "num_assistant_tokens_schedule", "cache_implementation"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
)
# Ids that the tokenizer and the template put into the text.
_TOKENS = (
    *("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "image_start_token_id", "image_end_token_id"),
    *("video_start_token_id", "video_end_token_id", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id"),
    *("eoa_token_index", "audio_token_id", "audio_start_token_id", "audio_end_token_id"),
    *("im_start_token_id", "im_end_token_id", "system_token_id", "user_token_id", "assistant_token_id"),
    *("tts_pad_token_id", "tts_bos_token_id", "tts_eos_token_id"),
)

_HARMLESS = frozenset([*_BOOKKEEPING, *_COMPUTATION, *_STORAGE, *_TRAINING, *_GENERATION, *_TOKENS])
_MARKS = ("unsloth_",)  # a trainer's own


def is_harmless(field: str) -> bool:
    """Tell whether a field of this name, with any value and in any part of config.json, changes no arithmetic."""
    return field in _HARMLESS or field.startswith(_MARKS)
