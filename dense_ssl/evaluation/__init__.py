"""What a frozen backbone is worth, by protocols with a name and a version.

Each protocol is one file: its `Config`, `load(path, config)` that opens the data, and
`run(backbone, data, config, cache)` that returns numbers. It gets a backbone and nothing of training, so
a run, a published checkpoint and timm's weights are evaluated by the same words:

    python -m dense_ssl.evaluation knn,segment --checkpoint runs/a --data DATA

| task            | data                                  | protocol            | file               |
|-----------------|---------------------------------------|---------------------|--------------------|
| knn             | train/CLASS/*, val/CLASS/*            | knn/v1              | knn.py             |
| knn             | COCO: annotations/instances_*.json    | knn-objects/v1      | knn.py             |
| linear          | as knn                                | linear/v1           | linear.py          |
| linear          | as knn, `variant=cached`              | linear-cached/v1    | linear.py          |
| semi-supervised | as knn                                | semi-supervised/v1  | semi_supervised.py |
| finetune        | as knn                                | finetune/v1         | finetune.py        |
| cluster         | as knn                                | cluster/v1          | cluster.py         |
| svm             | VOCdevkit/VOC2007                     | svm-VARIANT/v1      | svm.py             |
| segment-linear  | COCO, or as segment_layouts.py lists  | segment-linear/v1   | segment.py         |
| segment         | the same: its other name              | segment-linear/v1   | segment.py         |
| correspondence  | any folder of images, or shards       | correspondence/v1   | correspondence.py  |
| davis           | DAVIS-2017: JPEGImages/, Annotations/ | davis-dino/v1       | davis.py           |
| davis           | the same, `settings=revisiting`       | davis-revisiting/v1 | davis.py           |
| detect          | VOC07+12, or COCO                     | detect/SETTINGS/v1  | detect.py          |
| hummingbird     | as segment                            | hummingbird/v1      | hummingbird.py     |
| retrieve        | as segment                            | retrieve-kmeans/v1  | retrieve.py        |

Trained end to end on the data of `segment`: segment-fcn, segment-upernet, segment-fpn, segment-frozen and
segment-finetune. `settings=` chooses the published numbers (segment_protocols.py); the protocol is called
TASK/SETTINGS/v1.
"""
