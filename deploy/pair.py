"""The command of the supervisor, see deploy/supervisor.py:

python -m deploy.pair --models road-signs.mar                       TorchServe with nginx in front of it
python -m deploy.pair --only torchserve --models road-signs.mar     for a container of its own, and
python -m deploy.pair --only nginx                                  for the one beside it, with $MLVGM_STATE in common
"""

from deploy import signals

if __name__ == "__main__":
    with signals.noted():  # from before the imports, which take a while
        from deploy.supervisor import main

        signals.leave(main())
