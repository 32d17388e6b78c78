# Sourced. `clean_env HOME PATH [NAME=VALUE ...]` sets the array `clean`, with which a command starts that sees
# nothing of this shell's own environment but the way to packages.
clean_env() {
    local home=$1 path=$2 name
    clean=(env -i PATH="$path" HOME="$home" LANG=C.UTF-8 "${@:3}")
    for name in PIP_INDEX_URL PIP_CONFIG_FILE PIP_FIND_LINKS PIP_CERT SSL_CERT_FILE HTTPS_PROXY https_proxy NO_PROXY no_proxy; do
        if [[ -n ${!name:-} ]]; then clean+=("$name=${!name}"); fi
    done
}
