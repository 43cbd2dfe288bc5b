#!/usr/bin/env bash
# python3 of a machine that the stub plays: `python3 -m venv FOLDER` makes an environment with nothing but rmft.
[[ "$1 $2" == '-m venv' ]] || exit 1
mkdir -p "$3/bin"
printf '#!/bin/sh\nexit 0\n' > "$3/bin/pip"
cp "$3/bin/pip" "$3/bin/python"
cp "$STUB_RMFT" "$3/bin/rmft"
chmod +x "$3"/bin/*
