"""The full-size sets of AP (arXiv 2604.06440) that could be learned by name.

AP reports 29 sets: VTAB-1k's 19 (`vtab:...`) and ten in full size. Of the ten, these four are named in what could be
read; the others are not known, and none is guessed.
"""

from vpt_jax.data.benchmarks.task import Cut, Files, Task, Tfds

_MOST, _TENTH, _TRAIN, _TEST = Cut('train', until=90), Cut('train', 90), Cut('train'), Cut('test')
_ALL = 'Full size'

TASKS = (
    Task('pets', _ALL, 37, Tfds('oxford_iiit_pet', '3.2.0', _MOST, _TENTH, _TEST, also=(4,)),
         Files(('oxford_pets',), coop=('split_zhou_OxfordPets.json', 'images')), '774 MiB', 'CC BY-SA 4.0',
         'https://www.robots.ox.ac.uk/~vgg/data/pets/'),
    Task('cars', _ALL, 196, Tfds('cars196', '2.0.0', _TRAIN, None, _TEST, name_field='id'),
         Files(('stanford_cars', 'Stanford-cars', 'StanfordCars', 'cars'), 'cars',
               coop=('split_zhou_StanfordCars.json', ''),
               packed=('cars_train.tgz', 'cars_test.tgz', 'car_devkit.tgz')), '1.8 GiB', 'for research',
         'https://ai.stanford.edu/~jkrause/cars/car_dataset.html'),
    Task('svhn', _ALL, 10, Tfds('svhn_cropped', '3.0.0', _MOST, _TENTH, _TEST), None, '1.5 GiB',
         'not for commercial use', 'http://ufldl.stanford.edu/housenumbers/'),
    Task('gtsrb', _ALL, 43, None,
         Files(('GTSRB', 'gtsrb'), 'gtsrb',
               packed=('GTSRB_Final_Training_Images.zip', 'GTSRB_Final_Test_Images.zip', 'GTSRB_Final_Test_GT.zip')),
         '0.4 GiB', 'none stated', 'https://benchmark.ini.rub.de/gtsrb_dataset.html'),
)  # fmt: skip
