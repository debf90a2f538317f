/*
 * What agent/domain/page.py asks of many pages at once; the rules, and where they come from, are said there.
 * Pages are little-endian, as the machine is. Built by hooks/hatch_build.py.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_BYTES 8192
#define SUMS 32
#define ROW_BYTES (SUMS * sizeof(uint32_t))
#define FNV_PRIME 16777619u

/* Where the fields of a page's header are. */
#define CHECKSUM_AT 8
#define FLAGS_AT 10
#define LOWER_AT 12
#define UPPER_AT 14
#define SPECIAL_AT 16
#define SIZE_AND_VERSION_AT 18
#define HEADER_BYTES 24
#define KNOWN_FLAGS 7 /* PD_VALID_FLAG_BITS */
#define ALL_VISIBLE 4 /* PD_ALL_VISIBLE */
#define LAYOUT_VERSIONS 5 /* highest known; PG_PAGE_LAYOUT_VERSION is 4 */

/*
 * No WAL has a lower LSN: the first segment is number 1, and 1 MiB at least. Pages do: what initdb wrote, and a GiST index
 * that PostgreSQL 14 to 16 built by sorting has the LSN 1 (GistBuildLSN). Such a page may have been written since the
 * parent read it.
 */
#define FIRST_WAL_LSN ((uint64_t)1 << 20)

size_t wrong_pages(const unsigned char *pages, size_t count, uint32_t first_block, uint64_t start_lsn, bool *is_wrong);
bool changed_pages(const unsigned char *pages, size_t count, uint64_t since_lsn, const bool *is_mapped, bool *is_changed);

static const uint32_t bases[SUMS] = {
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
};

static uint16_t short_at(const unsigned char *page, size_t at)
{
    uint16_t value;
    __builtin_memcpy(&value, page + at, sizeof value);
    return value;
}

static uint64_t lsn_of(const unsigned char *page)
{
    uint32_t halves[2];
    __builtin_memcpy(halves, page, sizeof halves);
    return (uint64_t)halves[0] << 32 | halves[1];
}

/* Take one word into each of the sums. Nothing here depends on another word: the compiler makes vectors of it. */
static inline void mix(uint32_t *sums, const uint32_t *row)
{
    for (size_t i = 0; i < SUMS; i++) {
        uint32_t mixed = sums[i] ^ row[i];
        sums[i] = (mixed * FNV_PRIME) ^ (mixed >> 17);
    }
}

static uint16_t checksum_of(const unsigned char *page, uint32_t block)
{
    static const uint32_t zeros[SUMS];
    uint32_t sums[SUMS], row[SUMS], folded = block;

    __builtin_memcpy(sums, bases, sizeof sums);
    __builtin_memcpy(row, page, sizeof row);
    __builtin_memset((unsigned char *)row + CHECKSUM_AT, 0, sizeof(uint16_t)); /* the checksum itself counts as 0 */
    mix(sums, row);
    for (size_t at = ROW_BYTES; at < PAGE_BYTES; at += ROW_BYTES) {
        __builtin_memcpy(row, page + at, sizeof row);
        mix(sums, row);
    }
    mix(sums, zeros);
    mix(sums, zeros);
    for (size_t i = 0; i < SUMS; i++)
        folded ^= sums[i];
    return (uint16_t)(folded % 65535 + 1);
}

static bool is_empty(const unsigned char *page)
{
    uint64_t word, any = 0;

    for (size_t at = 0; at < PAGE_BYTES; at += sizeof word) {
        __builtin_memcpy(&word, page + at, sizeof word);
        any |= word;
    }
    return any == 0;
}

static bool is_new(const unsigned char *page)
{
    return short_at(page, UPPER_AT) == 0;
}

/* Whether it begins as an initialised page does. */
static bool is_page(const unsigned char *page)
{
    const unsigned lower = short_at(page, LOWER_AT), upper = short_at(page, UPPER_AT);
    const unsigned special = short_at(page, SPECIAL_AT), layout = short_at(page, SIZE_AND_VERSION_AT);

    return short_at(page, FLAGS_AT) <= KNOWN_FLAGS && HEADER_BYTES <= lower && lower <= upper && upper <= special
           && special <= PAGE_BYTES && layout > PAGE_BYTES && layout <= PAGE_BYTES + LAYOUT_VERSIONS;
}

/* Mark in `is_wrong` which of `count` pages a base backup begun at `start_lsn` should not hold; return how many. */
size_t wrong_pages(const unsigned char *pages, size_t count, uint32_t first_block, uint64_t start_lsn, bool *is_wrong)
{
    size_t wrong = 0;

    for (size_t i = 0; i < count; i++) {
        const unsigned char *page = pages + i * PAGE_BYTES;

        if (is_new(page))
            is_wrong[i] = !is_empty(page);
        else
            is_wrong[i] = lsn_of(page) < start_lsn
                          && checksum_of(page, first_block + (uint32_t)i) != short_at(page, CHECKSUM_AT);
        wrong += is_wrong[i];
    }
    return wrong;
}

/*
 * Mark in `is_changed` which of `count` pages may have changed at or after `since_lsn`. Where `is_mapped` is not null,
 * those it marks have changed, too, if they are all-visible. Return false if one of them is no page.
 */
bool changed_pages(const unsigned char *pages, size_t count, uint64_t since_lsn, const bool *is_mapped, bool *is_changed)
{
    for (size_t i = 0; i < count; i++) {
        const unsigned char *page = pages + i * PAGE_BYTES;
        const uint64_t lsn = lsn_of(page);

        if (!is_new(page) && !is_page(page))
            return false;
        is_changed[i] = is_new(page) || lsn >= since_lsn || lsn < FIRST_WAL_LSN
                        || (is_mapped != NULL && is_mapped[i] && (short_at(page, FLAGS_AT) & ALL_VISIBLE) != 0);
    }
    return true;
}
