#!/usr/bin/env bash
# The main job on real input: publish a real file, read it back, compare every byte; then kill the node with -9 in the
# middle of a second publish, start it again, and look for every acknowledged message.
#
#   deploy/demo.sh [path of the mainstem program]        KEEP=1 keeps the temporary directory
set -euo pipefail

mainstem=${1:-mainstem}
lines_min=100000

if [[ -z "${NO_COLOR:-}" && ( -t 1 || -n "${FORCE_COLOR:-}" ) ]]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' cyan=$'\e[36m' off=$'\e[0m'
else
    bold='' dim='' green='' red='' cyan='' off=''
fi
chapter() { printf '\n%s%s%s\n' "$bold$cyan" "$1" "$off"; }
say() { printf '  %s\n' "$1"; }
good() {
    printf '  %s✔%s %s\n' "$green" "$off" "$1"
    seen+=("$1")
}
fail() {
    printf '  %s✘ %s%s\n' "$red" "$1" "$off" >&2
    [[ -s "$dir/node.log" ]] && { echo "the node's last lines:" >&2; tail -15 "$dir/node.log" >&2; }
    exit 1
}
shown() { printf "%'d" "$1" 2>/dev/null || printf '%d' "$1"; }
size_of() { stat -c %s "$1"; }
# `run command …`: shows the command, then does it.
# The line that says what is run goes to the terminal, even where the output of the command goes to a file.
exec 3>&1
run() {
    {
        printf '  %s$ mainstem' "$dim"
        printf ' %s' "${@//"$dir/"/}"
        printf '%s\n' "$off"
    } >&3
    "$mainstem" "$@"
}

seen=()
node=''
dir=$(mktemp -d "${TMPDIR:-/tmp}/mainstem-demo.XXXXXX")
end() {
    [[ -n "$node" ]] && kill "$node" 2>/dev/null && wait "$node" 2>/dev/null
    if [[ -n "${KEEP:-}" ]]; then echo "kept: $dir"; else rm -rf -- "$dir"; fi
}
trap end EXIT
trap 'exit 130' INT TERM

start_node() {
    rm -f "$dir/ports.json"
    local began=$EPOCHREALTIME
    "$mainstem" server --data-dir "$dir/data" --listen 127.0.0.1:0 --monitor-listen 127.0.0.1:0 \
        --ports-file "$dir/ports.json" >>"$dir/node.log" 2>&1 &
    node=$!
    until [[ -s "$dir/ports.json" ]]; do
        kill -0 "$node" 2>/dev/null || { node=''; fail 'the node did not start'; }
        sleep 0.01
    done
    ready_ms=$(((${EPOCHREALTIME/[.,]/} - ${began/[.,]/}) / 1000))
    MAINSTEM_SERVER=$(sed -E 's/.*"client" *: *"([^"]*)".*/\1/' "$dir/ports.json" | head -1)
    export MAINSTEM_SERVER
}

# Real text that is on any Debian machine, in records separated by blank lines or in lines.
find_input() {
    local enough
    enough() { [[ -s "$dir/input" && $(wc -l <"$dir/input") -ge $lines_min ]]; }
    source_name='the package catalogue (apt-cache dumpavail)' records=blank-line
    apt-cache dumpavail 2>/dev/null >"$dir/input" || true
    enough && return
    source_name='the package lists of apt'
    local list
    for list in /var/lib/apt/lists/*_Packages*; do
        [[ -e "$list" ]] && /usr/lib/apt/apt-helper cat-file "$list" 2>/dev/null
    done >"$dir/input" || true
    enough && return
    source_name='the installed packages (dpkg status)'
    cat /var/lib/dpkg/status 2>/dev/null >"$dir/input" || true
    enough && return
    records=newline
    source_name='the word list'
    cat /usr/share/dict/words 2>/dev/null >"$dir/input" || true
    enough && return
    source_name='the files of the installed packages'
    cat /var/lib/dpkg/info/*.list /var/lib/dpkg/info/*.md5sums 2>/dev/null >"$dir/input" || true
    enough && return
    source_name='the names of all files below /usr'
    find /usr -xdev -printf '%M %s %t %p\n' 2>/dev/null >"$dir/input" || true
    enough && return
    source_name='the names of all files'
    find / -xdev -printf '%M %s %t %p\n' 2>/dev/null >"$dir/input" || true
    enough || fail "no text of $lines_min lines found on this machine"
}

# How many records a file holds.
count() { if [[ $records == blank-line ]]; then awk -v RS= 'END { print NR }' "$1"; else wc -l <"$1"; fi; }

chapter '1  A real file'
find_input
if [[ $records == blank-line ]]; then
    separator='\n\n'
    # Exactly one blank line after each record, as `sub` will print them.
    awk -v RS= '{ print $0 "\n" }' "$dir/input" >"$dir/records"
    what='records'
else
    separator='\n'
    cp "$dir/input" "$dir/records"
    what='lines'
fi
total=$(count "$dir/records")
bytes=$(size_of "$dir/records")
as_found=''
cmp -s "$dir/input" "$dir/records" || as_found=' (blank lines evened out)'
good "$source_name: $(shown "$(wc -l <"$dir/input")") lines, $(shown "$total") $what, $((bytes / 1048576)) MiB$as_found"

chapter '2  A node, a stream, and the file in it'
start_node
good "node ready in $ready_ms ms at $MAINSTEM_SERVER, its data in a temporary directory"
run stream create PACKAGES >/dev/null
began=$EPOCHREALTIME
run pub PACKAGES --file "$dir/records" --record-separator "$records" 2>"$dir/pub.txt" || { cat "$dir/pub.txt" >&2; fail 'publishing failed'; }
us=$((${EPOCHREALTIME/[.,]/} - ${began/[.,]/}))
sed 's/^/    /' "$dir/pub.txt" | tail -1
good "published $(shown "$total") $what, each acknowledged after it was synced to disk: $(shown $((total * 1000000 / us))) a second, $((bytes / us)) MB/s, all told"

chapter '3  Read it back'
began=$EPOCHREALTIME
run sub PACKAGES --from beginning --count "$total" --raw --delimiter "$separator" >"$dir/back" 2>"$dir/sub.txt" || { cat "$dir/sub.txt" >&2; fail 'reading failed'; }
us=$((${EPOCHREALTIME/[.,]/} - ${began/[.,]/}))
cmp "$dir/records" "$dir/back" || fail 'what was read differs from what was published'
good "read $(shown "$total") $what back: $(shown $((total * 1000000 / us))) a second, $((bytes / us)) MB/s; every byte is the same"

chapter '4  kill -9 in the middle of a publish'
run stream create AGAIN >/dev/null
enough_acks=$((total / 4))
acked() { [[ -s "$dir/acks" ]] && tail -n 2 "$dir/acks" | sed -nE 's/.*"last" *: *([0-9]+).*/\1/p' | tail -1; }
# Small batches: many acknowledgements, and time to interrupt them.
run pub AGAIN --file "$dir/records" --record-separator "$records" --batch-bytes 16KiB --retry-for 1s --acks "$dir/acks" --quiet \
    2>"$dir/pub.txt" &
publisher=$!
while kill -0 "$publisher" 2>/dev/null; do
    now=$(acked || true)
    ((${now:-0} >= enough_acks)) && break
    sleep 0.005
done
kill -9 "$node" 2>/dev/null || fail 'the node was gone already'
wait "$node" 2>/dev/null || true
node=''
if wait "$publisher"; then
    interrupted=''
else
    interrupted='yes'
fi
now=$(acked || true)
[[ -n "$now" ]] || fail 'nothing was acknowledged before the kill'
if [[ -n "$interrupted" ]]; then
    good "killed the node with -9 while it was publishing: $(shown "$now") of $(shown "$total") $what were acknowledged by then"
else
    say "this machine was too quick: all $(shown "$now") $what were acknowledged when the kill came"
fi

chapter '5  Start it again'
start_node
good "ready again in $ready_ms ms, with what was on disk"
run sub AGAIN --from beginning --raw --delimiter "$separator" >"$dir/back" 2>"$dir/sub.txt" || { cat "$dir/sub.txt" >&2; fail 'reading failed'; }
stored=$(count "$dir/back")
((stored >= now)) || fail "$now $what were acknowledged, only $stored are there"
# One shard, one producer: what is stored is the beginning of the file.
cmp -n "$(size_of "$dir/back")" "$dir/records" "$dir/back" || fail 'what is there is not what was published'
good "all $(shown "$now") acknowledged $what are there, in order, every byte the same$( ((stored > now)) && printf ' (and %s more, whole, that were on their way)' "$(shown $((stored - now)))")"
run sub PACKAGES --from beginning --raw --delimiter "$separator" >"$dir/back" 2>"$dir/sub.txt" || fail 'reading failed'
cmp "$dir/records" "$dir/back" || fail 'the first stream has changed'
good "the first stream is as it was: $(shown "$total") $what, every byte the same"
kill "$node" && wait "$node" || fail 'the node did not end well'
node=''

chapter 'What was seen'
for line in "${seen[@]}"; do printf '  %s✔%s %s\n' "$green" "$off" "$line"; done
printf '\n  %sTry it yourself:%s %s dev\n' "$bold" "$off" "$mainstem"
