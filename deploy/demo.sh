#!/usr/bin/env bash
# The main job on real input: three nodes on this machine, a replicated stream, a real file published to it and read back,
# every byte compared; then once more, while the node that leads the stream is killed with -9 in the middle of it: the
# publish goes on, and every acknowledged message is there, once and in order.
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
    local log
    for log in "$dir"/n*.log; do
        [[ -s "$log" ]] && { echo "the last lines of ${log##*/}:" >&2; tail -5 "$log" >&2; }
    done
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
declare -A pid client peer
dir=$(mktemp -d "${TMPDIR:-/tmp}/mainstem-demo.XXXXXX")
end() {
    local name
    for name in "${!pid[@]}"; do kill "${pid[$name]}" 2>/dev/null || true; done
    for name in "${!pid[@]}"; do wait "${pid[$name]}" 2>/dev/null || true; done
    [[ -z "${publisher:-}" ]] || kill "$publisher" 2>/dev/null || true
    if [[ -n "${KEEP:-}" ]]; then echo "kept: $dir"; else rm -rf -- "$dir"; fi
}
trap end EXIT
trap 'exit 130' INT TERM

now_us() { echo "${EPOCHREALTIME/[.,]/}"; }

# Six ports in a row that nobody listens at, below those that the system gives to connections: the nodes keep theirs.
free() { ! (exec 4<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
choose_ports() {
    local first port
    while :; do
        first=$((15000 + RANDOM % 15000))
        for ((port = first; port < first + 6; port++)); do free "$port" || continue 2; done
        break
    done
    for name in n1 n2 n3; do
        client[$name]=127.0.0.1:$first peer[$name]=127.0.0.1:$((first + 1))
        first=$((first + 2))
    done
}

# `launch NAME FLAG…`: starts a node, and does not wait for it.
launch() {
    local name=$1
    shift
    rm -f "$dir/$name.ports"
    "$mainstem" server --name "$name" --zone "zone-$name" --data-dir "$dir/$name" --ports-file "$dir/$name.ports" \
        --listen "${client[$name]}" --peer-listen "${peer[$name]}" \
        --monitor-listen 127.0.0.1:0 --drain-timeout 3s "$@" >>"$dir/$name.log" 2>&1 &
    pid[$name]=$!
}

ready() {
    local name=$1
    until [[ -s "$dir/$name.ports" ]]; do
        kill -0 "${pid[$name]}" 2>/dev/null || fail "node $name did not start"
        sleep 0.01
    done
}

# Who leads the only shard of a stream.
leader_of() { "$mainstem" shard ls "$1" 2>/dev/null | grep -oE 'n[1-3]\*' | head -1 | tr -d '*'; }

well() {
    "$mainstem" cluster health --exit-when-healthy --nodes 3 --interval 50ms --within 30s >"$dir/health.txt" 2>&1 ||
        { cat "$dir/health.txt" >&2; fail 'the cluster is not healthy'; }
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

chapter '2  Three nodes, one cluster'
choose_ports
began=$(now_us)
launch n1 --bootstrap
ready n1
for name in n2 n3; do launch "$name" --join "${peer[n1]}"; done
for name in n2 n3; do ready "$name"; done
export MAINSTEM_SERVER="${client[n1]},${client[n2]},${client[n3]}"
well
good "a cluster of three processes after $((($(now_us) - began) / 1000)) ms, each with its own directory; MAINSTEM_SERVER=$MAINSTEM_SERVER"
run cluster nodes | sed 's/^/    /'

chapter '3  A stream on three replicas, and the file in it'
began=$(now_us)
run stream create PACKAGES --replicas 3 >"$dir/create.txt" 2>&1 || { cat "$dir/create.txt" >&2; fail 'no stream'; }
good "created in $((($(now_us) - began) / 1000)) ms, the command line's own start included"
began=$(now_us)
run pub PACKAGES --file "$dir/records" --record-separator "$records" 2>"$dir/pub.txt" || { cat "$dir/pub.txt" >&2; fail 'publishing failed'; }
us=$(($(now_us) - began))
sed 's/^/    /' "$dir/pub.txt" | tail -1
good "published $(shown "$total") $what, each acknowledged after two of three nodes had it on disk: $(shown $((total * 1000000 / us))) a second, $((bytes / us)) MB/s, all told"
began=$(now_us)
run sub PACKAGES --from beginning --count "$total" --raw --delimiter "$separator" >"$dir/back" 2>"$dir/sub.txt" || { cat "$dir/sub.txt" >&2; fail 'reading failed'; }
us=$(($(now_us) - began))
cmp "$dir/records" "$dir/back" || fail 'what was read differs from what was published'
good "read $(shown "$total") $what back: $(shown $((total * 1000000 / us))) a second, $((bytes / us)) MB/s; every byte is the same"

chapter '4  kill -9 of its leader in the middle of a publish'
run stream create AGAIN --replicas 3 >"$dir/create.txt" 2>&1 || { cat "$dir/create.txt" >&2; fail 'no stream'; }
run shard ls AGAIN | sed 's/^/    /'
enough_acks=$((total / 4))
acked() { [[ -s "$dir/acks" ]] && tail -n 2 "$dir/acks" | sed -nE 's/.*"last" *: *([0-9]+).*/\1/p' | tail -1; }
# Small batches: many acknowledgements, and time to interrupt them.
run pub AGAIN --file "$dir/records" --record-separator "$records" --batch-bytes 16KiB --acks "$dir/acks" --quiet 2>"$dir/pub.txt" &
publisher=$!
while kill -0 "$publisher" 2>/dev/null; do
    now=$(acked || true)
    ((${now:-0} >= enough_acks)) && break
    sleep 0.005
done
leader=$(leader_of AGAIN || true)
[[ -n "$leader" ]] || fail 'nobody leads the stream'
killed=$(now_us)
kill -9 "${pid[$leader]}" 2>/dev/null || fail "node $leader was gone already"
# Reaped here, where nothing is said of it.
wait "${pid[$leader]}" 2>/dev/null || true
unset "pid[$leader]"
before=$(acked || true)
interrupted=''
kill -0 "$publisher" 2>/dev/null && interrupted=yes
# The longest pause between acknowledgements from then on, as seen every few milliseconds.
last=$killed longest=0 size=$(size_of "$dir/acks")
while kill -0 "$publisher" 2>/dev/null; do
    now=$(size_of "$dir/acks")
    if ((now > size)); then
        at=$(now_us)
        ((at - last > longest)) && longest=$((at - last))
        last=$at size=$now
    fi
    sleep 0.002
done
wait "$publisher" || { cat "$dir/pub.txt" >&2; fail 'the publish failed'; }
publisher=''
if [[ -n "$interrupted" ]]; then
    good "killed $leader, which led, with -9 when $(shown "${before:-0}") of $(shown "$total") $what were acknowledged; the publish went on"
    good "the longest pause between two acknowledgements was $((longest / 1000)) ms"
else
    say "this machine was too quick: all $(shown "$total") $what were acknowledged when the kill came"
fi
run shard ls AGAIN | sed 's/^/    /'
run sub AGAIN --from beginning --raw --delimiter "$separator" >"$dir/back" 2>"$dir/sub.txt" || { cat "$dir/sub.txt" >&2; fail 'reading failed'; }
cmp "$dir/records" "$dir/back" || fail 'what is there is not what was published'
good "all $(shown "$total") acknowledged $what are there, once and in order, every byte the same"

chapter "5  $leader comes back"
began=$(now_us)
launch "$leader" $([[ "$leader" == n1 ]] && echo --bootstrap || echo "--join ${peer[n1]}")
ready "$leader"
well
good "all three replicas are current again $((($(now_us) - began) / 1000)) ms after it was started"
run shard ls | sed 's/^/    /'
for stream in PACKAGES AGAIN; do
    MAINSTEM_SERVER=${client[$leader]} run sub "$stream" --from beginning --raw --delimiter "$separator" >"$dir/back" 2>"$dir/sub.txt" ||
        { cat "$dir/sub.txt" >&2; fail "reading from $leader failed"; }
    cmp "$dir/records" "$dir/back" || fail "$stream has changed"
done
good "both streams read through $leader: every byte the same"
for name in n1 n2 n3; do kill "${pid[$name]}"; done
for name in n1 n2 n3; do
    wait "${pid[$name]}" || fail "node $name did not end well"
    unset "pid[$name]"
done

chapter 'What was seen'
for line in "${seen[@]}"; do printf '  %s✔%s %s\n' "$green" "$off" "$line"; done
printf '\n  %sTry it yourself:%s %s dev --nodes 3\n' "$bold" "$off" "$mainstem"
