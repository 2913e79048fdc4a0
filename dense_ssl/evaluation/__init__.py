"""What a frozen backbone is worth, by protocols with a name and a version.

Each protocol is one file: its `Config`, `load(path, config)` that opens the data, and
`run(backbone, data, config, cache)` that returns numbers. It gets a backbone and nothing of training, so
a run, a published checkpoint and timm's weights are evaluated by the same words:

    python -m dense_ssl.evaluation knn,segment --checkpoint runs/a --data DATA

| task            | data                                    | protocol            | in                                |
|-----------------|-----------------------------------------|---------------------|-----------------------------------|
| knn             | train/CLASS/*, val/CLASS/*, archives.py | knn/v1              | classification/knn.py             |
| knn             | COCO: annotations/instances_*.json      | knn-objects/v1      | classification/knn.py             |
| object-knn      | COCO                                    | object-knn/v1       | classification/object_knn.py      |
| linear          | as knn                                  | linear/v1           | classification/linear.py          |
| linear          | as knn, `variant=cached`                | linear-cached/v1    | classification/linear.py          |
| semi-supervised | as knn                                  | semi-supervised/v1  | classification/semi_supervised.py |
| cluster         | as knn                                  | cluster/v1          | classification/cluster.py         |
| finetune        | as knn                                  | finetune/v1         | classification/finetune.py        |
| svm             | VOCdevkit/VOC2007                       | svm-VARIANT/v1      | classification/svm.py             |
| segment-linear  | COCO, or as layouts.py lists            | segment-linear/v1   | segmentation/probe.py             |
| segment         | the same: its other name                | segment-linear/v1   | segmentation/probe.py             |
| attention       | as segment, val alone                   | attention/v1        | matching/attention.py             |
| hummingbird     | as segment                              | hummingbird/v1      | matching/hummingbird.py           |
| retrieve        | as segment                              | retrieve-kmeans/v1  | matching/retrieve.py              |
| correspondence  | any folder of images, or shards         | correspondence/v1   | matching/correspondence.py        |
| davis           | DAVIS-2017: JPEGImages/, Annotations/   | davis-dino/v1       | matching/davis.py                 |
| davis           | the same, `settings=revisiting`         | davis-revisiting/v1 | matching/davis.py                 |
| landmarks       | roxford5k/ or rparis6k/                 | landmarks-NAME/v1   | retrieval/landmarks.py            |
| copydays        | original/, strong/, ...                 | copydays/v1         | retrieval/copydays.py             |
| detect          | VOC07+12, or COCO                       | detect/SETTINGS/v1  | detection/train.py                |

Trained end to end on the data of `segment`: segment-fcn, segment-upernet, segment-fpn, segment-frozen and
segment-finetune. `settings=` chooses the published numbers (segmentation/protocols.py); the protocol is called
TASK/SETTINGS/v1.
"""  # noqa: E501  (table rows cannot wrap)
