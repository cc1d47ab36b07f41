"""Every error a user can meet, as a tree.

CandorError                 one clear sentence for the page and the command line
├── BadInput                what was asked cannot be done as asked; nothing was started
│   ├── BadParameter        unknown name, wrong type, or outside its range
│   ├── EmptyPrompt         there is nothing to start from
│   └── OutOfContext        more tokens than the model's window
├── ModelError              the model
│   ├── ModelNotFound       no such name, folder or file
│   ├── ModelUnsafe         only pickled weights, or code that would have to run
│   ├── ModelBroken         weights that cannot be read, or are not what they should be
│   ├── ModelTooLarge       it would not fit into the memory there is
│   ├── ModelUnfit          the architecture does not pass the engine's checks
│   └── ModelLacks          a method needs what this model cannot do
├── StoreError              the database
│   ├── StoreUnavailable    unwritable, locked, or not a database
│   ├── StoreTooNew         written by a newer version of Candor
│   ├── RunNotFound         no run with that id
│   └── BadImport           a file that is no export of ours
└── Stopped                 raised inside a run when its stop flag is set; never shown as an error
"""


class CandorError(Exception):
    """Its text is one sentence that says what is wrong and what would help."""


class BadInput(CandorError):
    pass


class BadParameter(BadInput):
    pass


class EmptyPrompt(BadInput):
    pass


class OutOfContext(BadInput):
    pass


class ModelError(CandorError):
    pass


class ModelNotFound(ModelError):
    pass


class ModelUnsafe(ModelError):
    pass


class ModelBroken(ModelError):
    pass


class ModelTooLarge(ModelError):
    pass


class ModelUnfit(ModelError):
    pass


class ModelLacks(ModelError):
    pass


class StoreError(CandorError):
    pass


class StoreUnavailable(StoreError):
    pass


class StoreTooNew(StoreError):
    pass


class RunNotFound(StoreError):
    pass


class BadImport(StoreError):
    pass


class Stopped(CandorError):
    pass
