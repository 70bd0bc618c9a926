#!/bin/sh
# Reviews the tree in the current folder without a model and prints one JSON object in the shape of the
# 5933 profile. Needs only find, sort and awk. At most 100 issues; binary and very large files are counted,
# not read.
set -eu
LC_ALL=C
export LC_ALL
find . -path ./.git -prune -o -type f -size -1024k -print | sort | awk '
function json(s) {
    # One replacement that every awk reads alike: a backslash before each.
    gsub(/["\\]/, "\\\\&", s); gsub(/\t/, "\\t", s)
    gsub(/[\001-\010\013\014\016-\037]/, " ", s); sub(/\r$/, "", s); gsub(/\r/, " ", s)
    return "\"" s "\""
}
function issue(line, severity, category, title, advice) {
    found++
    if (found > 100) return
    list = list (found > 1 ? "," : "") "{\"file_path\":" json(file) ",\"line\":" line ",\"end_line\":" line \
        ",\"severity\":\"" severity "\",\"category\":\"" category "\",\"title\":" json(title) \
        ",\"description\":" json(title " in " file " at line " line) ",\"suggestion\":" json(advice) "}"
    if (severity == "Critical") critical++
}
{
    path = $0; file = substr(path, 3); files++
    n = 0; todo = 0; long = 0; conflict = 0; secret = 0; crlf = 0; binary = 0
    while ((getline line < path) > 0) {
        n++
        if (n <= 20 && line ~ /[\001-\010\016-\032]/) { binary = 1; break }
        if (line ~ /^(<<<<<<< |>>>>>>> )/ && !conflict) conflict = n
        if (line ~ /^-----BEGIN [A-Z ]*PRIVATE KEY-----/ && !secret) secret = n
        if (line ~ /(TODO|FIXME)/) { todos++; if (!todo) todo = n }
        if (length(line) > 400 && !long) long = n
        if (line ~ /\r$/) crlf++
    }
    close(path)
    if (binary) { binaries++; next }
    lines += n
    ext = file; sub(/.*\//, "", ext)
    if (ext ~ /.\.[^.]+$/) sub(/.*\./, "", ext); else ext = "(none)"
    by[ext] += n
    if (secret) issue(secret, "Critical", "security", "A private key is committed", "Remove it from the history and replace the key.")
    if (conflict) issue(conflict, "Critical", "correctness", "An unresolved merge conflict", "Resolve the conflict and remove its markers.")
    if (crlf && crlf < n) issue(1, "Minor", "style", "Mixed line endings", "Use one kind of line ending in a file.")
    if (long) issue(long, "Nit", "style", "A line of over 400 characters", "Break the line, or keep generated files out of the repository.")
    if (todo) issue(todo, "Nit", "maintainability", "An open note to do", "Do it, or file it where it is seen.")
}
END {
    for (ext in by) kinds = kinds (kinds == "" ? "" : ",") json(ext) ":" by[ext]
    printf "{\"status\":\"%s\",\"summary\":%s,\"issues\":[%s],\"stats\":{\"files\":%d,\"binary_files\":%d,\"lines\":%d,\"open_notes\":%d,\"issues_found\":%d,\"issues_listed\":%d,\"lines_by_extension\":{%s}},\"model_used\":null}\n", \
        critical ? "RequestChanges" : "Comment", \
        json(files + 0 " files, " lines + 0 " lines of text, " found + 0 " findings of a mechanical review, " critical + 0 " of them critical"), \
        list, files, binaries, lines, todos, found, (found > 100 ? 100 : found), kinds
}'
