/*
 * A thread for each worker, each with a listener of its own; a thread serves one connection at a time.
 *
 *     cc -pthread -o threads threads.c
 *     ./threads 127.0.0.1 8080 8
 *
 * A path such as /0.08 keeps the thread for so many seconds.
 */

#include <arpa/inet.h>
#include <err.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct worker {
	int number;
	int listener;
};

static int listen_at(const struct sockaddr_in *where)
{
	int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int yes = 1;

	/* SO_REUSEPORT goes before bind(2): that makes the sockets of one user a group. */
	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEPORT, &yes, sizeof(yes)) ||
	    bind(sock, (const struct sockaddr *)where, sizeof(*where)) || listen(sock, 1024))
		err(1, "listen");
	return sock;
}

/* Read a request up to the empty line at its end; 0 if the client closed before. */
static int read_request(int client, char *text, size_t size)
{
	size_t length = 0;

	text[0] = 0;
	while (!strstr(text, "\r\n\r\n")) {
		ssize_t got = read(client, text + length, size - 1 - length);

		if (got <= 0)
			return 0;
		length += got;
		text[length] = 0;
	}
	return 1;
}

static void answer(int client, const struct worker *worker)
{
	char request[4096], number[16];
	double seconds = 0;
	int length;

	if (!read_request(client, request, sizeof(request)))
		return;
	sscanf(request, "GET /%lf", &seconds);
	usleep(1e6 * seconds);
	length = snprintf(number, sizeof(number), "%d\n", worker->number);
	dprintf(client,
		"HTTP/1.1 200 OK\r\nConnection: close\r\n"
		"Content-Length: %d\r\n\r\n%s",
		length, number);
}

static void *serve(void *argument)
{
	const struct worker *worker = argument;

	for (;;) {
		int client = accept(worker->listener, NULL, NULL);

		if (client < 0)
			continue;
		answer(client, worker);
		close(client);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct sockaddr_in where = {.sin_family = AF_INET};
	int count;

	if (argc != 4 || inet_pton(AF_INET, argv[1], &where.sin_addr) != 1)
		errx(2, "usage: threads ADDRESS PORT THREADS");
	where.sin_port = htons(atoi(argv[2]));
	count = atoi(argv[3]);
	signal(SIGPIPE, SIG_IGN);
	for (int number = 0; number < count; number++) {
		struct worker *worker = malloc(sizeof(*worker));
		pthread_t thread;

		if (!worker)
			err(1, "malloc");
		*worker = (struct worker){number, listen_at(&where)};
		if (pthread_create(&thread, NULL, serve, worker))
			errx(1, "cannot start thread %d", number);
	}
	pause();
}
