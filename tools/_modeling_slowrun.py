"""A model of train_gpt.py for transformers; tools/export.py copies it as modeling_slowrun.py.

Logits are log p of the next token: of one GPT or of a mixture, and with the memory of the row where
the GPTs have one. Softmax leaves them as they are.
"""
import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    from ._decode import Mixture
    from .train_gpt import GPT, Config
except ImportError:
    from _decode import Mixture
    from _runs import GPT, Config

# what transformers call the cache: since 5.2x `cache`
CACHE_NAME = next(name for name in ("cache", "past_key_values")
                  if name in CausalLMOutputWithPast.__dataclass_fields__)


class SlowrunConfig(PretrainedConfig):
    """settings: fields of train_gpt.Config that are not as usual; mixture_weights: of each GPT."""
    model_type = "slowrun"

    def __init__(self, settings=None, mixture_weights=(1.0,), **kwargs):
        self.settings = settings or {}
        self.mixture_weights = list(mixture_weights)
        super().__init__(**kwargs)

    def script_config(self):
        """The Config of train_gpt.py."""
        return Config(**{name: tuple(map(tuple, value)) if isinstance(value, list) else value
                         for name, value in self.settings.items()})


class SlowrunCache(Cache):
    """What the GPTs of a mixture have read, for past_key_values."""
    is_linear = (False,)
    is_croppable = False        # so not for assisted generation

    def __init__(self, readers):
        super().__init__(layers=[])
        self.readers = readers
        self.num_read = 0

    def get_seq_length(self, layer_idx=0):
        return self.num_read

    def reorder_cache(self, beam_idx):
        for reader in self.readers:
            reader.reorder(beam_idx)


class SlowrunForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SlowrunConfig

    def __init__(self, config):
        super().__init__(config)
        script_config = config.script_config()
        self.mixture = Mixture([GPT(script_config) for _ in config.mixture_weights],
                               config.mixture_weights)
        self.post_init()

    def _init_weights(self, module):
        """Weights are those of the file; training is train_gpt.py's."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def forward(self, input_ids, attention_mask=None, labels=None, past_key_values=None,
                cache=None, use_cache=None, logits_to_keep=0, return_dict=True):
        """Log p of what follows each of int64 `input_ids` [B, T] (the last logits_to_keep of them,
        0: all), and with `labels` (the same tokens, -100: not counted) the mean loss.

        A row that is longer than a row of training (config.max_position_embeddings) goes on as
        _decode.Reader says. cache, or past_key_values as it was called before: of the call before,
        to go on. attention_mask [B, T]: 0 for padding, in front of rows only.
        """
        for member in self.mixture.members:
            member.dtype = self.dtype           # activations are of the dtype of the weights
        cache = past_key_values if cache is None else cache
        if cache is None:
            cache = SlowrunCache(self.mixture.readers(left_padding(input_ids, attention_mask)))
        elif not isinstance(cache, SlowrunCache):
            raise ValueError(f"cache: must be what this model returned, not {type(cache).__name__}")
        count = input_ids.shape[1]
        kept = count if labels is not None else min(logits_to_keep or count, count)
        logits = self.mixture(input_ids, cache.readers, last=kept)
        cache.num_read += count
        loss = None
        if labels is not None:
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        kept_for_next = {CACHE_NAME: None if use_cache is False else cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept_for_next)


def left_padding(input_ids, attention_mask):
    """int64 [B]: how many tokens in front of each row are padding. ValueError for any elsewhere."""
    if attention_mask is None:
        return torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    padding = (attention_mask == 0).sum(dim=1)
    position = torch.arange(attention_mask.shape[1], device=padding.device)
    if not torch.equal(attention_mask != 0, position >= padding[:, None]):
        raise ValueError("attention_mask: padding must be in front of a row: load the tokenizer"
                         " with padding_side='left'")
    return padding
