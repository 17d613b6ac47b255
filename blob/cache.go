package blob

import (
	"cmp"
	"container/list"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

const (
	partialSuffix = ".partial"
	partialMode   = 0o600
	cacheMode     = 0o755 // tasks that run as other users read the files by their path
	lockName      = "lock"

	metricPrefix = "rxvision_blob_cache_"
)

// Fetch opens blob d at a byte offset, from wherever the caller gets it. The reader must end with an error when ctx does;
// the cache closes it. Only one Fetch of a digest runs at a time.
type Fetch func(ctx context.Context, d Digest, offset int64) (io.ReadCloser, error)

// Cache is a folder of verified blobs, one read-only file each, named by the digest's hex digits. An unfinished download
// is kept as "<digits>.partial" and continued by the next Get, also after a restart.
//
// All files together stay within the limit: a download reserves its full size before it starts, for which the least
// recently used files that nobody holds are removed. After a restart, the time of the last Get of each, kept as its
// modification time, stands for its last use.
//
// A file counts as verified only in the process that has hashed it, and as long as its inode, size and modification time
// stay what they were: after a restart, a crash of the machine or foreign hands, the next Get reads it once in full.
type Cache struct {
	dir   string
	limit int64
	log   *slog.Logger
	lock  *os.File

	hits, downloads, evictions prometheus.Counter

	mu      sync.Mutex
	entries map[Digest]*entry
	recent  *list.List // of *entry: every entry, the most recently used first
	used    int64      // sum of the entries' bytes
}

// entry is one blob that is on disk, whole or in part, or asked for. All but verified is guarded by Cache.mu.
type entry struct {
	digest Digest
	place  *list.Element
	pins   int   // Gets under way and results not yet released: not to be evicted
	bytes  int64 // on disk, or reserved there for a download
	work   *work // what makes the file ready now, if anything does

	verified fs.FileInfo // the file as it was when hashed, nil before; owned by whoever runs work
}

// work is one attempt to make an entry's file ready, shared by all who wait for it.
type work struct {
	done chan struct{} // closed at the end, after err and left are set
	err  error
	left bool // the caller that did it gave up: another must take over
}

// OpenCache opens the cache in dir, which it creates if missing and which must hold nothing else, and evicts down to
// limit bytes. A second process gets ErrLocked. Metrics go to reg unless it is nil.
func OpenCache(dir string, limit int64, log *slog.Logger, reg prometheus.Registerer) (*Cache, error) {
	if limit <= 0 {
		return nil, fmt.Errorf("blob cache %s: limit of %d bytes; give a positive one", dir, limit)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("blob cache: %w", err)
	}
	c := &Cache{dir: dir, limit: limit, log: log, entries: make(map[Digest]*entry), recent: list.New()}
	if err := c.open(reg); err != nil {
		return nil, errors.Join(fmt.Errorf("blob cache %s: %w", dir, explain(err)), c.Close())
	}
	return c, nil
}

func (c *Cache) open(reg prometheus.Registerer) error {
	err := os.MkdirAll(c.dir, cacheMode)
	if err != nil {
		return err
	}
	if c.lock, err = os.OpenFile(filepath.Join(c.dir, lockName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := flock(c.lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w by another process: stop it or choose another folder", ErrLocked)
		}
		return fmt.Errorf("lock: %w", err)
	}
	if err := c.register(reg); err != nil {
		return err
	}
	if err := c.scan(); err != nil {
		return err
	}
	return c.reserve(nil, 0)
}

// Close lets another process open the folder. Call it after the last Get has returned; files handed out stay.
func (c *Cache) Close() error {
	if c.lock == nil {
		return nil
	}
	return c.lock.Close()
}

// Get returns the path of a read-only file with exactly the bytes that d names, fetching them if need be. The file stays
// until release is called, once or more often. Size is what the caller was told the blob has, in bytes.
//
// Concurrent Gets of one digest share one download, and its error; if the caller whose fetch runs gives up, another
// goes on with its own. An interrupted download keeps what it has for the next Get. Errors: ErrDigest names both digests,
// ErrTooLarge if the cache could never hold size bytes, ErrCacheFull if it cannot now, ErrNoSpace, the errors of fetch,
// io.ErrUnexpectedEOF if its reader ended early.
func (c *Cache) Get(ctx context.Context, d Digest, size int64, fetch Fetch) (path string, release func(), err error) {
	switch {
	case d == Digest{}:
		return "", nil, errors.New("get blob: no digest given")
	case size < 0:
		return "", nil, fmt.Errorf("get blob %s: size %d is negative", d, size)
	}
	e := c.pin(d)
	if err := c.ready(ctx, e, size, fetch); err != nil {
		c.unpin(e)
		return "", nil, fmt.Errorf("get blob %s: %w", d, explain(err))
	}
	return c.path(d), sync.OnceFunc(func() { c.unpin(e) }), nil
}

// ready returns when e's file is verified, by own work or that of another Get.
func (c *Cache) ready(ctx context.Context, e *entry, size int64, fetch Fetch) error {
	for {
		c.mu.Lock()
		w := e.work
		if w == nil {
			w = &work{done: make(chan struct{})}
			e.work = w
			c.mu.Unlock()
			err := c.do(ctx, e, size, fetch)
			c.mu.Lock()
			w.err, w.left, e.work = err, err != nil && ctx.Err() != nil, nil
			c.mu.Unlock()
			close(w.done)
			return err
		}
		c.mu.Unlock()
		select {
		case <-w.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if !w.left {
			return w.err
		}
	}
}

// do makes e's file ready, alone.
func (c *Cache) do(ctx context.Context, e *entry, size int64, fetch Fetch) error {
	kept, err := c.check(ctx, e)
	if err != nil {
		return err
	}
	if kept {
		c.hits.Inc()
	} else {
		c.downloads.Inc()
		if err := c.reserve(e, size); err != nil {
			return err
		}
		err := c.download(ctx, e.digest, size, fetch)
		c.settle(e)
		if err != nil {
			return err
		}
	}
	return c.touch(e)
}

// check reports whether e's file is there with the right bytes, and removes it if it has wrong ones.
func (c *Cache) check(ctx context.Context, e *entry) (bool, error) {
	path := c.path(e.digest)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		e.verified = nil
		c.settle(e)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if v := e.verified; v != nil && os.SameFile(v, info) && v.Size() == info.Size() && v.ModTime().Equal(info.ModTime()) {
		return true, nil
	}
	e.verified = nil
	got, err := hashFile(ctx, path)
	if err != nil {
		return false, err
	}
	if got == e.digest {
		return true, nil
	}
	c.log.Warn("cached blob is damaged: removed", "digest", e.digest.String(), "found", got.String())
	err = os.Remove(path)
	c.settle(e)
	return false, err
}

// touch records that e's file, just verified, was used now.
func (c *Cache) touch(e *entry) error {
	path, now := c.path(e.digest), time.Now()
	if err := errors.Join(os.Chmod(path, blobMode), os.Chtimes(path, now, now)); err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	e.verified = info
	c.mu.Lock()
	c.recent.MoveToFront(e.place)
	c.mu.Unlock()
	return nil
}

// download completes and verifies d's partial file, and gives it its final name. What could be continued is kept.
func (c *Cache) download(ctx context.Context, d Digest, size int64, fetch Fetch) error {
	partial := c.path(d) + partialSuffix
	f, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE, partialMode)
	if err != nil {
		return err
	}
	got, err := c.fill(ctx, f, d, size, fetch)
	err = errors.Join(err, f.Close())
	switch {
	case errors.Is(err, errExcess): // from this source, or from an earlier one that left the partial file
		err = fmt.Errorf("%w: want %s of %d bytes, got more; deleted", ErrDigest, d, size)
	case errors.Is(explain(err), ErrNoSpace): // leave the room to others
	case err != nil:
		return err
	case got != d:
		err = fmt.Errorf("%w: want %s, got %s from %d bytes; deleted", ErrDigest, d, got, size)
	default:
		return os.Rename(partial, c.path(d))
	}
	return errors.Join(err, os.Remove(partial))
}

// fill hashes what f has, appends what is missing of size bytes, and returns the digest of all.
func (c *Cache) fill(ctx context.Context, f *os.File, d Digest, size int64, fetch Fetch) (got Digest, err error) {
	hash := sha256.New()
	have, err := copyBytes(ctx, hash, f, size)
	if err != nil {
		return got, err
	}
	if have < size {
		if have > 0 {
			c.log.Info("resuming download of blob", "digest", d.String(), "offset", have, "size", size)
		}
		body, err := fetch(ctx, d, have)
		if err != nil {
			return got, fmt.Errorf("fetch at %d: %w", have, err)
		}
		defer body.Close()
		n, err := copyBytes(ctx, io.MultiWriter(f, hash), body, size-have)
		if err == nil && have+n < size {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return got, fmt.Errorf("fetch from %d, ended at %d of %d bytes: %w", have, have+n, size, err)
		}
	}
	hash.Sum(got.sum[:0])
	return got, nil
}

func hashFile(ctx context.Context, path string) (d Digest, err error) {
	f, err := os.Open(path)
	if err != nil {
		return d, err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, contextReader{ctx, f}); err != nil {
		return d, err
	}
	hash.Sum(d.sum[:0])
	return d, nil
}

func (c *Cache) path(d Digest) string { return filepath.Join(c.dir, d.Hex()) }

// pin returns d's entry, new if need be, and keeps it from eviction until unpin.
func (c *Cache) pin(d Digest) *entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[d]
	if e == nil {
		e = c.add(d)
	}
	e.pins++
	return e
}

func (c *Cache) unpin(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent.MoveToFront(e.place)
	if e.pins--; e.pins == 0 && e.bytes == 0 && e.verified == nil {
		c.drop(e)
	}
}

// add makes an empty entry, the most recently used one. Caller holds mu.
func (c *Cache) add(d Digest) *entry {
	e := &entry{digest: d}
	e.place = c.recent.PushFront(e)
	c.entries[d] = e
	return e
}

// account sets what e takes up. Caller holds mu.
func (c *Cache) account(e *entry, bytes int64) {
	c.used += bytes - e.bytes
	e.bytes = bytes
}

// drop forgets an entry. Caller holds mu.
func (c *Cache) drop(e *entry) {
	c.account(e, 0)
	c.recent.Remove(e.place)
	delete(c.entries, e.digest)
}

// reserve accounts size bytes to e, instead of what it had, and evicts until all fit; e may be nil.
func (c *Cache) reserve(e *entry, size int64) error {
	if size > c.limit {
		return fmt.Errorf("%w: %d bytes, the cache may hold %d; raise its limit", ErrTooLarge, size, c.limit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	held := int64(0)
	for _, other := range c.entries {
		if other != e && other.pins > 0 {
			held += other.bytes
		}
	}
	if size > c.limit-held {
		return fmt.Errorf("%w: %d bytes wanted, but %d of %d are in use by others; end a task or raise the limit", ErrCacheFull, size, held, c.limit)
	}
	need := size
	if e != nil {
		need -= e.bytes
	}
	for place := c.recent.Back(); place != nil && c.used+need > c.limit; {
		victim := place.Value.(*entry)
		place = place.Prev()
		if victim.pins > 0 {
			continue
		}
		if err := c.evict(victim); err != nil {
			return err
		}
	}
	if e != nil {
		c.account(e, size)
	}
	return nil
}

// evict removes an unpinned entry and its files. Caller holds mu.
func (c *Cache) evict(e *entry) error {
	for _, path := range []string{c.path(e.digest), c.path(e.digest) + partialSuffix} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("evict: %w", err)
		}
	}
	c.log.Debug("evicted blob", "digest", e.digest.String(), "bytes", e.bytes)
	c.evictions.Inc()
	c.drop(e)
	return nil
}

// settle accounts to e what is on disk for it, and removes a download that got nothing.
func (c *Cache) settle(e *entry) {
	var bytes int64
	whole, partial := c.path(e.digest), c.path(e.digest)+partialSuffix
	if info, err := os.Lstat(whole); err == nil {
		bytes += info.Size()
	}
	if info, err := os.Lstat(partial); err == nil {
		bytes += info.Size()
		if info.Size() == 0 {
			_ = os.Remove(partial)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.account(e, bytes)
}

// scan takes stock of the folder when the cache opens, before anyone else has it.
func (c *Cache) scan() error {
	files, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	var all []Info
	for _, file := range files {
		d, ok := fromHex(strings.TrimSuffix(file.Name(), partialSuffix))
		if !ok || !file.Type().IsRegular() {
			if file.Name() != lockName {
				c.log.Warn("foreign file in the blob cache: it is left alone and not counted", "path", filepath.Join(c.dir, file.Name()))
			}
			continue
		}
		info, err := file.Info()
		if err != nil {
			return err
		}
		all = append(all, Info{d, info.Size(), info.ModTime()})
	}
	slices.SortFunc(all, func(a, b Info) int {
		return cmp.Or(a.ModTime.Compare(b.ModTime), cmp.Compare(a.Digest.Hex(), b.Digest.Hex()))
	})
	for _, info := range all {
		e := c.entries[info.Digest]
		if e == nil {
			e = c.add(info.Digest)
		}
		c.account(e, e.bytes+info.Size)
		c.recent.MoveToFront(e.place)
	}
	return nil
}

// register makes the cache's metrics, and publishes them unless reg is nil.
func (c *Cache) register(reg prometheus.Registerer) error {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: metricPrefix + name, Help: help})
	}
	gauge := func(name, help string, value func() int64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricPrefix + name, Help: help}, func() float64 {
			c.mu.Lock()
			defer c.mu.Unlock()
			return float64(value())
		})
	}
	c.hits = counter("hits_total", "Requests answered with a file that was there.")
	c.downloads = counter("downloads_total", "Downloads begun or continued.")
	c.evictions = counter("evictions_total", "Blobs removed to make room.")
	if reg == nil {
		return nil
	}
	for _, m := range []prometheus.Collector{
		c.hits, c.downloads, c.evictions,
		gauge("bytes", "Bytes on disk or reserved there by downloads.", func() int64 { return c.used }),
		gauge("limit_bytes", "The most bytes the cache may hold.", func() int64 { return c.limit }),
	} {
		if err := reg.Register(m); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}
