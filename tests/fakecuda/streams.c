/* The fake's streams and events: a thread per stream, which is late on purpose. */
#include "fake.h"

#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct mark { /* one recording of an event; whoever waits for it keeps it, the event itself may be recorded anew */
    int references;
    bool done;
};
struct event {
    struct event *next;
    struct context *context;
    struct mark *latest;
};
struct stream {
    struct stream *next;
    struct context *context;
    struct operation *first, **last;
    uint64_t submitted, finished;
    int waiters;
    bool closing;
};

/* One lock for all queues and marks: their critical sections are a few instructions long. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct stream *streams;
static struct event *events;

static void drop(struct mark *mark) {
    if (mark && --mark->references == 0)
        free(mark);
}

static void be_late(uint64_t *seed) {
    int64_t longest = control->delay_us;
    if (longest <= 0)
        return;
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    int64_t delay = (int64_t)((*seed >> 33) % (uint64_t)(longest + 1));
    nanosleep(&(struct timespec){delay / 1000000, delay % 1000000 * 1000}, NULL);
}

static void *work(void *argument) {
    struct stream *stream = argument;
    uint64_t seed = (uintptr_t)stream ^ (uint64_t)getpid() << 32 ^ (uint64_t)time(NULL);
    pthread_mutex_lock(&lock);
    for (;;) {
        struct operation *operation = stream->first;
        if (!operation && stream->closing && !stream->waiters)
            break;
        if (!operation) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        pthread_mutex_unlock(&lock);
        be_late(&seed);
        operation->perform(operation);
        pthread_mutex_lock(&lock);
        stream->first = operation->next;
        if (!stream->first)
            stream->last = &stream->first;
        stream->finished++;
        free(operation);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    free(stream);
    return NULL;
}

static CUresult start(struct context *context, struct stream **started) {
    struct stream *stream = calloc(1, sizeof *stream);
    pthread_t thread;
    sigset_t all, before;
    stream->context = context;
    stream->last = &stream->first;
    sigfillset(&all); /* the program's signals are for its own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failure = pthread_create(&thread, NULL, work, stream);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failure) {
        free(stream);
        return OPERATING_SYSTEM;
    }
    pthread_detach(thread);
    *started = stream;
    return OK;
}

static struct stream *known_stream(CUstream handle) {
    struct stream *stream = streams;
    while (stream && stream != handle)
        stream = stream->next;
    return stream;
}

static struct event *known_event(CUevent handle) {
    struct event *event = events;
    while (event && event != handle)
        event = event->next;
    return event;
}

/* 0, 1 and 2 are the driver's default streams; each context has one here. Called with the lock held. */
static CUresult resolve(CUstream handle, struct context *current, struct stream **stream) {
    if ((uintptr_t)handle > 2)
        return (*stream = known_stream(handle)) ? OK : INVALID_HANDLE;
    if (!current)
        return INVALID_CONTEXT;
    if (!current->null_stream)
        TRY(start(current, &current->null_stream));
    *stream = current->null_stream;
    return OK;
}

CUresult stream_of(CUstream handle, struct context *current, struct stream **stream) {
    pthread_mutex_lock(&lock);
    CUresult result = resolve(handle, current, stream);
    pthread_mutex_unlock(&lock);
    return result == OK && (*stream)->context != current ? INVALID_HANDLE : result;
}

static void await(struct stream *stream, uint64_t ticket) {
    stream->waiters++; /* another thread may destroy it meanwhile */
    while (stream->finished < ticket)
        pthread_cond_wait(&changed, &lock);
    stream->waiters--;
    pthread_cond_broadcast(&changed);
}

static uint64_t enqueue(struct stream *stream, struct operation wanted) {
    struct operation *operation = malloc(sizeof *operation);
    *operation = wanted;
    operation->next = NULL;
    *stream->last = operation;
    stream->last = &operation->next;
    pthread_cond_broadcast(&changed);
    return ++stream->submitted;
}

CUresult submit(struct stream *stream, struct operation operation, bool wait) {
    pthread_mutex_lock(&lock);
    uint64_t ticket = enqueue(stream, operation);
    if (wait)
        await(stream, ticket);
    pthread_mutex_unlock(&lock);
    return wait ? sticky() : OK;
}

/* Streams */

API cuStreamCreate(CUstream *stream, unsigned flags) {
    struct context *current;
    TRY(enter_context(&current));
    if (!stream || flags > 1)
        return INVALID_VALUE;
    TRY(start(current, stream));
    pthread_mutex_lock(&lock);
    (*stream)->next = streams;
    streams = *stream;
    pthread_mutex_unlock(&lock);
    counters->streams++;
    return OK;
}

API cuStreamDestroy_v2(CUstream handle) {
    TRY(enter());
    pthread_mutex_lock(&lock);
    struct stream *stream = known_stream(handle);
    if (stream) {
        struct stream **at = &streams;
        while (*at != stream)
            at = &(*at)->next;
        *at = stream->next;
        stream->closing = true; /* its thread ends, and frees it, when the queue is empty */
        counters->streams--;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return stream ? OK : INVALID_HANDLE;
}
ALSO(cuStreamDestroy)

static CUresult look_up(CUstream handle, struct stream **stream) {
    struct context *current = NULL;
    if ((uintptr_t)handle <= 2)
        TRY(enter_context(&current));
    return resolve(handle, current, stream);
}

API cuStreamQuery(CUstream handle) {
    TRY(enter());
    struct stream *stream;
    pthread_mutex_lock(&lock);
    CUresult result = look_up(handle, &stream);
    if (result == OK && stream->finished < stream->submitted)
        result = NOT_READY;
    pthread_mutex_unlock(&lock);
    return sticky() ? sticky() : result;
}

API cuStreamSynchronize(CUstream handle) {
    TRY(enter());
    struct stream *stream;
    pthread_mutex_lock(&lock);
    CUresult result = look_up(handle, &stream);
    if (result == OK)
        await(stream, stream->submitted);
    pthread_mutex_unlock(&lock);
    return sticky() ? sticky() : result;
}

API cuStreamGetCtx(CUstream handle, CUcontext *context) {
    TRY(enter());
    struct stream *stream;
    pthread_mutex_lock(&lock);
    CUresult result = look_up(handle, &stream);
    if (result == OK && context)
        *context = stream->context;
    pthread_mutex_unlock(&lock);
    return context ? result : INVALID_VALUE;
}

API cuCtxSynchronize(void) {
    struct context *current;
    TRY(enter_context(&current));
    pthread_mutex_lock(&lock);
    for (bool idle = false; !idle;) {
        idle = !current->null_stream || current->null_stream->finished == current->null_stream->submitted;
        for (struct stream *stream = streams; stream; stream = stream->next)
            idle = idle && (stream->context != current || stream->finished == stream->submitted);
        if (!idle)
            pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
    return sticky();
}

/* Events */

API cuEventCreate(CUevent *event, unsigned flags) {
    struct context *current;
    TRY(enter_context(&current));
    if (!event || flags > 7)
        return INVALID_VALUE;
    *event = calloc(1, sizeof **event);
    (*event)->context = current;
    pthread_mutex_lock(&lock);
    (*event)->next = events;
    events = *event;
    pthread_mutex_unlock(&lock);
    counters->events++;
    return OK;
}

API cuEventDestroy_v2(CUevent handle) {
    TRY(enter());
    pthread_mutex_lock(&lock);
    struct event **at = &events;
    while (*at && *at != handle)
        at = &(*at)->next;
    struct event *event = *at;
    if (event) {
        *at = event->next;
        drop(event->latest);
        free(event);
        counters->events--;
    }
    pthread_mutex_unlock(&lock);
    return event ? OK : INVALID_HANDLE;
}
ALSO(cuEventDestroy)

static void reach(struct operation *operation) {
    struct mark *mark = operation->subject;
    pthread_mutex_lock(&lock);
    mark->done = true;
    drop(mark);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void wait_for(struct operation *operation) {
    struct mark *mark = operation->subject;
    pthread_mutex_lock(&lock);
    while (!mark->done)
        pthread_cond_wait(&changed, &lock);
    drop(mark);
    pthread_mutex_unlock(&lock);
}

API cuEventRecord(CUevent handle, CUstream on) {
    TRY(enter());
    struct stream *stream;
    pthread_mutex_lock(&lock);
    struct event *event = known_event(handle);
    CUresult result = event ? look_up(on, &stream) : INVALID_HANDLE;
    if (result == OK && stream->context != event->context)
        result = INVALID_HANDLE;
    if (result == OK) {
        struct mark *mark = malloc(sizeof *mark);
        *mark = (struct mark){2, false}; /* the event's and the operation's */
        drop(event->latest);
        event->latest = mark;
        enqueue(stream, (struct operation){.perform = reach, .subject = mark});
    }
    pthread_mutex_unlock(&lock);
    return result;
}

API cuStreamWaitEvent(CUstream handle, CUevent awaited, unsigned flags) {
    (void)flags;
    TRY(enter());
    struct stream *stream;
    pthread_mutex_lock(&lock);
    struct event *event = known_event(awaited);
    CUresult result = event ? look_up(handle, &stream) : INVALID_HANDLE;
    if (result == OK && event->latest) { /* one never recorded counts as complete */
        event->latest->references++;
        enqueue(stream, (struct operation){.perform = wait_for, .subject = event->latest});
    }
    pthread_mutex_unlock(&lock);
    return result;
}

API cuEventQuery(CUevent handle) {
    TRY(enter());
    pthread_mutex_lock(&lock);
    struct event *event = known_event(handle);
    CUresult result = !event ? INVALID_HANDLE : !event->latest || event->latest->done ? OK : NOT_READY;
    pthread_mutex_unlock(&lock);
    return sticky() ? sticky() : result;
}

API cuEventSynchronize(CUevent handle) {
    TRY(enter());
    pthread_mutex_lock(&lock);
    struct event *event = known_event(handle);
    struct mark *mark = event ? event->latest : NULL;
    if (mark) {
        mark->references++;
        while (!mark->done)
            pthread_cond_wait(&changed, &lock);
        drop(mark);
    }
    pthread_mutex_unlock(&lock);
    return sticky() ? sticky() : event ? OK : INVALID_HANDLE;
}
