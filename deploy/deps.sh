#!/usr/bin/env bash
# What building needs: the C++ compiler and libclang for RocksDB, and Rust. On Debian and Ubuntu, as root, what is
# missing is installed; anywhere else the command to type is printed.
set -euo pipefail

need_rust=1.90
packages=()
command -v g++ >/dev/null || packages+=(g++)
command -v make >/dev/null || packages+=(make)
# bindgen loads libclang at build time.
if [[ -z "${LIBCLANG_PATH:-}" ]] && ! compgen -G "/usr/lib/llvm-*/lib/libclang*.so*" >/dev/null &&
    ! compgen -G "/usr/lib/*/libclang*.so*" >/dev/null && ! compgen -G "/usr/lib64/libclang*.so*" >/dev/null; then
    packages+=(libclang-dev)
fi
# Not needed, but a second build of RocksDB then takes seconds.
optional=()
command -v ccache >/dev/null || optional+=(ccache)

if ((${#packages[@]})); then
    if command -v apt-get >/dev/null && [[ "$(id -u)" == 0 ]]; then
        echo "installing: ${packages[*]} ${optional[*]:-}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -y --no-install-recommends "${packages[@]}" "${optional[@]}" >/dev/null 2>&1 ||
            { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}" "${optional[@]}"; }
    else
        echo "missing: ${packages[*]}" >&2
        echo "install them, on Debian or Ubuntu with:" >&2
        echo "    sudo apt-get install ${packages[*]} ${optional[*]:-}" >&2
        echo "(elsewhere: a C++20 compiler, make and libclang)" >&2
        exit 1
    fi
fi

export PATH="$PATH:$HOME/.cargo/bin"
if ! command -v cargo >/dev/null; then
    echo "missing: Rust $need_rust or later; install it with:" >&2
    echo "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" >&2
    exit 1
fi
have=$(rustc --version | cut -d' ' -f2)
if [[ "$(printf '%s\n' "$need_rust" "$have" | sort -V | head -1)" != "$need_rust" ]]; then
    echo "Rust $have is too old, $need_rust or later is needed: rustup update stable" >&2
    exit 1
fi
