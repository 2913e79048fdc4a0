"""Backbone weights for other libraries, each checked by loading it there before it gets its name.

    python -m dense_ssl.export --run runs/a --to timm,huggingface,onnx

| TO          | files                                  | read by                                          |
|-------------|----------------------------------------|--------------------------------------------------|
| timm        | backbone_timm.pth, .safetensors        | `timm.create_model(NAME, num_classes=0)`, strict |
| torchvision | backbone_torchvision.pth, .safetensors | `torchvision.models`, only `fc` missing          |
| safetensors | backbone_timm.safetensors              | as timm                                          |
| detectron2  | backbone_detectron2.pkl                | `MODEL.WEIGHTS`; STRIDE_IN_1X1 False, RGB        |
| timm-hub    | timm-hub/                              | `timm.create_model("local-dir:...")`             |
| transformers | transformers/                         | `AutoModel.from_pretrained`, `AutoImageProcessor` |
| huggingface | both folders                           |                                                  |
| onnx        | backbone.onnx                          | onnxruntime and others; free batch and size      |
| official    | official_moco.pth.tar, and so on       | the authors' code: encoders and queues           |
| all         | each of these that the network has     |                                                  |

The check compares features of one fixed input bit for bit, or, where other code computes them, up to
float32's rounding. A .json beside each says what was compared, the differences, and how timm is to build
it: a ViT with two class tokens by `reg_tokens=1`. Only when named: `one_token`, `second_token`,
`no_token`, the same trunk with fewer class tokens, which is not the same network any more.
"""

from dense_ssl.export.exporting import TARGETS, Exported, export

__all__ = ["TARGETS", "Exported", "export"]
