#!/bin/sh
# Prints a map of the tree in the current folder as Markdown: its folders, and for each text file its
# length and first words. Needs only find, sort and awk. At most 2,000 files are listed.
set -eu
LC_ALL=C
export LC_ALL
find . -path ./.git -prune -o -type f -size -1024k -print | sort | awk '
function clean(s) {
    gsub(/[\001-\037]/, " ", s); gsub(/`/, "", s); gsub(/\|/, "/", s)
    sub(/^[ \t#\/*;!<>-]+/, "", s); sub(/[ \t*\/>-]+$/, "", s)
    return length(s) > 100 ? substr(s, 1, 97) "..." : s
}
{
    path = $0; file = substr(path, 3); files++
    n = 0; first = ""; binary = 0
    while ((getline line < path) > 0) {
        n++
        if (n <= 20 && line ~ /[\001-\010\016-\032]/) { binary = 1; break }
        if (first == "" && n <= 10 && line !~ /^#!/ && line !~ /^(import|use|from|package|#include) /) {
            text = clean(line)
            if (length(text) > 3) first = text
        }
    }
    close(path)
    lines += binary ? 0 : n
    if (files > 2000) next
    folder = file
    if (!sub(/\/[^\/]*$/, "", folder)) folder = "(top)"
    name = file; sub(/.*\//, "", name)
    if (!(folder in body)) order[++folders] = folder
    body[folder] = body[folder] "| `" name "` | " (binary ? "binary" : n) " | " first " |\n"
}
END {
    printf "# Map of the repository\n\n%d files, %d lines of text, %d folders.\n", files, lines, folders
    for (i = 1; i <= folders; i++)
        printf "\n## %s\n\n| file | lines | begins with |\n|---|---|---|\n%s", order[i], body[order[i]]
    if (files > 2000) printf "\n%d more files are not listed.\n", files - 2000
}'
