"""Batch norm sites of every torchvision model that has them: (sites, fused, partial, kept).

``python tests/zoo_expected.py`` prints the table as it is now; read the difference before committing it.
"""

from __future__ import annotations

__all__ = ["EXPECTED"]

EXPECTED: dict[str, tuple[int, int, int, int]] = {
    "deeplabv3_mobilenet_v3_large": (53, 50, 3, 0),
    "deeplabv3_resnet101": (111, 109, 2, 0),
    "deeplabv3_resnet50": (60, 58, 2, 0),
    "densenet121": (121, 117, 4, 0),
    "densenet161": (161, 157, 4, 0),
    "densenet169": (169, 165, 4, 0),
    "densenet201": (201, 197, 4, 0),
    "efficientnet_b0": (49, 49, 0, 0),
    "efficientnet_b1": (69, 69, 0, 0),
    "efficientnet_b2": (69, 69, 0, 0),
    "efficientnet_b3": (78, 78, 0, 0),
    "efficientnet_b4": (96, 96, 0, 0),
    "efficientnet_b5": (116, 116, 0, 0),
    "efficientnet_b6": (134, 134, 0, 0),
    "efficientnet_b7": (163, 163, 0, 0),
    "efficientnet_v2_l": (217, 216, 1, 0),
    "efficientnet_v2_m": (157, 156, 1, 0),
    "efficientnet_v2_s": (110, 109, 1, 0),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (46, 45, 1, 0),
    "fasterrcnn_mobilenet_v3_large_fpn": (46, 45, 1, 0),
    "fasterrcnn_resnet50_fpn": (53, 53, 0, 0),
    "fasterrcnn_resnet50_fpn_v2": (65, 56, 9, 0),
    "fcn_resnet101": (105, 104, 1, 0),
    "fcn_resnet50": (54, 53, 1, 0),
    "fcos_resnet50_fpn": (53, 53, 0, 0),
    "googlenet": (59, 49, 10, 0),
    "inception_v3": (96, 96, 0, 0),
    "keypointrcnn_resnet50_fpn": (53, 53, 0, 0),
    "lraspp_mobilenet_v3_large": (47, 45, 2, 0),
    "maskrcnn_resnet50_fpn": (53, 53, 0, 0),
    "maskrcnn_resnet50_fpn_v2": (69, 59, 10, 0),
    "maxvit_t": (34, 24, 10, 0),
    "mc3_18": (20, 19, 1, 0),
    "mnasnet0_5": (52, 52, 0, 0),
    "mnasnet0_75": (52, 52, 0, 0),
    "mnasnet1_0": (52, 52, 0, 0),
    "mnasnet1_3": (52, 52, 0, 0),
    "mobilenet_v2": (52, 52, 0, 0),
    "mobilenet_v3_large": (46, 45, 1, 0),
    "mobilenet_v3_small": (34, 34, 0, 0),
    "quantized_googlenet": (59, 49, 10, 0),
    "quantized_inception_v3": (96, 96, 0, 0),
    "quantized_mobilenet_v2": (52, 52, 0, 0),
    "quantized_mobilenet_v3_large": (46, 45, 1, 0),
    "quantized_resnet18": (20, 20, 0, 0),
    "quantized_resnet50": (53, 53, 0, 0),
    "quantized_resnext101_32x8d": (104, 104, 0, 0),
    "quantized_resnext101_64x4d": (104, 104, 0, 0),
    "quantized_shufflenet_v2_x0_5": (56, 43, 13, 0),
    "quantized_shufflenet_v2_x1_0": (56, 43, 13, 0),
    "quantized_shufflenet_v2_x1_5": (56, 43, 13, 0),
    "quantized_shufflenet_v2_x2_0": (56, 43, 13, 0),
    "r2plus1d_18": (37, 36, 1, 0),
    "r3d_18": (20, 19, 1, 0),
    "raft_large": (15, 8, 7, 0),
    "regnet_x_16gf": (71, 71, 0, 0),
    "regnet_x_1_6gf": (59, 59, 0, 0),
    "regnet_x_32gf": (74, 74, 0, 0),
    "regnet_x_3_2gf": (80, 80, 0, 0),
    "regnet_x_400mf": (71, 71, 0, 0),
    "regnet_x_800mf": (53, 53, 0, 0),
    "regnet_x_8gf": (74, 74, 0, 0),
    "regnet_y_128gf": (86, 86, 0, 0),
    "regnet_y_16gf": (59, 59, 0, 0),
    "regnet_y_1_6gf": (86, 86, 0, 0),
    "regnet_y_32gf": (65, 65, 0, 0),
    "regnet_y_3_2gf": (68, 68, 0, 0),
    "regnet_y_400mf": (53, 53, 0, 0),
    "regnet_y_800mf": (47, 47, 0, 0),
    "regnet_y_8gf": (56, 56, 0, 0),
    "resnet101": (104, 104, 0, 0),
    "resnet152": (155, 155, 0, 0),
    "resnet18": (20, 20, 0, 0),
    "resnet34": (36, 36, 0, 0),
    "resnet50": (53, 53, 0, 0),
    "resnext101_32x8d": (104, 104, 0, 0),
    "resnext101_64x4d": (104, 104, 0, 0),
    "resnext50_32x4d": (53, 53, 0, 0),
    "retinanet_resnet50_fpn": (53, 53, 0, 0),
    "retinanet_resnet50_fpn_v2": (53, 53, 0, 0),
    "s3d": (77, 51, 26, 0),
    "shufflenet_v2_x0_5": (56, 43, 13, 0),
    "shufflenet_v2_x1_0": (56, 43, 13, 0),
    "shufflenet_v2_x1_5": (56, 43, 13, 0),
    "shufflenet_v2_x2_0": (56, 43, 13, 0),
    "ssdlite320_mobilenet_v3_large": (70, 63, 7, 0),
    "vgg11_bn": (8, 8, 0, 0),
    "vgg13_bn": (10, 10, 0, 0),
    "vgg16_bn": (13, 13, 0, 0),
    "vgg19_bn": (16, 16, 0, 0),
    "wide_resnet101_2": (104, 104, 0, 0),
    "wide_resnet50_2": (53, 53, 0, 0),
}


def _print_table() -> None:
    from zoo_models import batch_norm_models, build_on_meta

    import bnrestructure

    for name in batch_norm_models():
        plan = bnrestructure.explain(build_on_meta(name), backend="reference")
        print(f'    "{name}": {(len(plan.sites), *plan.counts.values())},')


if __name__ == "__main__":
    _print_table()
