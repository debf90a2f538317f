#include "reply_head.h"

#include <string.h>
#include <strings.h>

#include "protocol.h"

#define END_OF_LINE "\r\n"
#define HTTP_VERSION "HTTP/1.1 "
#define STATUS_DIGITS 3
/* More digits than any body of ours needs, and few enough never to overflow. */
#define LENGTH_DIGITS 18

struct slice {
    const char *start;
    size_t length;
};

size_t find_head_end(const char *bytes, size_t size)
{
    static const char end[] = END_OF_LINE END_OF_LINE;
    const size_t end_length = sizeof end - 1;

    for (size_t at = 0; at + end_length <= size; at++)
        if (memcmp(bytes + at, end, end_length) == 0)
            return at + end_length;
    return 0;
}

/* Take the next line off `rest`, without its end. False if there is no whole one, or it holds a control character. */
static bool next_line(struct slice *rest, struct slice *line)
{
    for (size_t at = 0; at + 1 < rest->length; at++) {
        unsigned char byte = (unsigned char)rest->start[at];
        if (byte == '\r' && rest->start[at + 1] == '\n') {
            *line = (struct slice){rest->start, at};
            *rest = (struct slice){rest->start + at + 2, rest->length - at - 2};
            return true;
        }
        if ((byte < ' ' && byte != '\t') || byte == 0x7f)
            return false;
    }
    return false;
}

/* Read `text` as a decimal number of at most `most` digits and nothing else. */
static bool parse_number(struct slice text, size_t most, uint64_t *number)
{
    if (text.length == 0 || text.length > most)
        return false;
    *number = 0;
    for (size_t at = 0; at < text.length; at++) {
        if (text.start[at] < '0' || text.start[at] > '9')
            return false;
        *number = *number * 10 + (uint64_t)(text.start[at] - '0');
    }
    return true;
}

static bool parse_status_line(struct slice line, int *status)
{
    const size_t version = sizeof HTTP_VERSION - 1, upto_status = version + STATUS_DIGITS;
    uint64_t number;

    if (line.length < upto_status || memcmp(line.start, HTTP_VERSION, version) != 0)
        return false;
    if (line.length > upto_status && line.start[upto_status] != ' ')
        return false;
    if (!parse_number((struct slice){line.start + version, STATUS_DIGITS}, STATUS_DIGITS, &number))
        return false;
    *status = (int)number;
    return true;
}

static struct slice trim(struct slice text)
{
    while (text.length > 0 && (*text.start == ' ' || *text.start == '\t'))
        text = (struct slice){text.start + 1, text.length - 1};
    while (text.length > 0 && (text.start[text.length - 1] == ' ' || text.start[text.length - 1] == '\t'))
        text.length--;
    return text;
}

static bool is_called(struct slice name, const char *header)
{
    return name.length == strlen(header) && strncasecmp(name.start, header, name.length) == 0;
}

/* Take what concerns us from one header line. A header said twice could mean either, so it means nothing. */
static bool parse_header(struct slice line, struct reply_head *head)
{
    const char *colon = memchr(line.start, ':', line.length);
    struct slice name, value;

    if (colon == NULL || colon == line.start)
        return false;
    name = (struct slice){line.start, (size_t)(colon - line.start)};
    value = trim((struct slice){colon + 1, line.length - name.length - 1});
    if (is_called(name, "Transfer-Encoding"))
        return false; /* the agent gives every body's length */
    if (is_called(name, "Content-Length"))
        return head->content_length == NO_LENGTH && parse_number(value, LENGTH_DIGITS, &head->content_length);
    if (is_called(name, HEADER_WAL_FILE)) {
        if (head->wal_file != NULL)
            return false;
        head->wal_file = value.start;
        head->wal_file_length = value.length;
    }
    return true;
}

bool parse_reply_head(const char *bytes, size_t size, struct reply_head *head)
{
    struct slice rest = {bytes, size}, line;

    *head = (struct reply_head){.content_length = NO_LENGTH};
    if (!next_line(&rest, &line) || !parse_status_line(line, &head->status))
        return false;
    while (next_line(&rest, &line)) {
        if (line.length == 0)
            return rest.length == 0;
        if (!parse_header(line, head))
            return false;
    }
    return false;
}

bool is_about(const struct reply_head *head, const char *name)
{
    return head->wal_file != NULL && head->wal_file_length == strlen(name) &&
           memcmp(head->wal_file, name, head->wal_file_length) == 0;
}
