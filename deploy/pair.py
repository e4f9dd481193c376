"""The command of the supervisor, see deploy/supervisor.py:

python -m deploy.pair --models road-signs.mar                       TorchServe behind nginx
python -m deploy.pair --only torchserve --models road-signs.mar     the same in two containers
python -m deploy.pair --only nginx                                  with a common $MLVGM_STATE
"""

from deploy import signals

if __name__ == "__main__":
    with signals.noted():  # before the imports, which take a while
        from deploy.supervisor import main

        signals.leave(main())
