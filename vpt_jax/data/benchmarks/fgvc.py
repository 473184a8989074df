"""VPT's five fine-grained sets (arXiv 2203.12119).

Where a set has no official validation set, a tenth of train (rounded up, stratified by class, by a fixed seed) is held
out: the published rule and sizes. The authors' own choice of images is in their train.json, val.json and test.json,
which are read where they lie beside the images. Settings are chosen on val; nothing is trained on it.
"""

from vpt_jax.data.benchmarks.task import Cut, Files, Task, Tfds

_TRAIN, _TEST = Cut('train'), Cut('test')
_ALL = 'Fine-grained'

TASKS = (
    Task('cub', _ALL, 200, Tfds('caltech_birds2011', '0.1.1', _TRAIN, None, _TEST, name_field='image/filename'),
         Files(('CUB_200_2011', 'cub'), 'birds', 'images', packed=('CUB_200_2011.tgz',)), '1.1 GiB',
         'not for commercial use', 'https://www.vision.caltech.edu/datasets/cub_200_2011/', ('CUB',)),
    Task('nabirds', _ALL, 555, None, Files(('nabirds',), 'birds', 'images', packed=('nabirds.tar.gz',)), '9 GiB',
         'not for commercial use', 'https://dl.allaboutbirds.org/nabirds', ('NABirds',)),
    Task('flowers', _ALL, 102,
         Tfds('oxford_flowers102', '2.1.1', _TRAIN, Cut('validation'), _TEST, name_field='file_name'),
         Files(('OxfordFlower', 'OxfordFlowers', 'flowers102', 'flowers'), 'flowers', '', packed=('102flowers.tgz',)),
         '329 MiB', 'none stated', 'https://www.robots.ox.ac.uk/~vgg/data/flowers/102/', ('OxfordFlowers',)),
    Task('dogs', _ALL, 120, Tfds('stanford_dogs', '0.2.0', _TRAIN, None, _TEST, name_field='image/filename'),
         Files(('Stanford-dogs', 'StanfordDogs', 'stanford_dogs', 'dogs'), 'dogs', 'Images',
               packed=('images.tar', 'lists.tar')), '778 MiB', 'none stated; images of ImageNet',
         'http://vision.stanford.edu/aditya86/ImageNetDogs/', ('StanfordDogs',)),
    Task('cars', _ALL, 196, Tfds('cars196', '2.0.0', _TRAIN, None, _TEST, name_field='id'),
         Files(('Stanford-cars', 'StanfordCars', 'stanford_cars', 'cars'), 'cars', '',
               packed=('cars_train.tgz', 'cars_test.tgz', 'car_devkit.tgz')), '1.8 GiB', 'for research',
         'https://ai.stanford.edu/~jkrause/cars/car_dataset.html', ('StanfordCars',),
         'the official address no longer serves the images'),
)  # fmt: skip
