package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/prometheus/client_golang/prometheus"
)

func mustOpenCache(tb testing.TB, dir string, limit int64) *Cache {
	tb.Helper()
	log := slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	c, err := OpenCache(dir, limit, log, prometheus.NewRegistry())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if c.Close() == nil { // not closed by the test
			mustBeSound(tb, c)
		}
	})
	return c
}

// mustBeSound checks that the accounts of an idle cache agree with its disk and its limit.
func mustBeSound(tb testing.TB, c *Cache) {
	tb.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var disk, sum int64
	files, err := os.ReadDir(c.dir)
	if err != nil {
		tb.Error(err)
		return
	}
	for _, file := range files {
		if _, ok := fromHex(strings.TrimSuffix(file.Name(), partialSuffix)); !ok {
			continue
		}
		info, err := file.Info()
		if err != nil {
			tb.Error(err)
			return
		}
		disk += info.Size()
	}
	for d, e := range c.entries {
		sum += e.bytes
		if e.work != nil || e.digest != d {
			tb.Errorf("entry %s: %+v", d, e)
		}
	}
	if disk != sum || sum != c.used || c.used > c.limit || c.recent.Len() != len(c.entries) {
		tb.Errorf("%d bytes on disk, %d in %d entries, %d in use, limit %d, %d in the order of use",
			disk, sum, len(c.entries), c.used, c.limit, c.recent.Len())
	}
}

// origin serves blobs to a cache and notes the offsets asked for.
type origin struct {
	mu      sync.Mutex
	offsets []int64
	store   *Store
	wrap    func(io.ReadCloser) io.ReadCloser // spoils what is served, unless nil
}

func newOrigin(tb testing.TB) *origin {
	return &origin{store: mustOpenStore(tb, "file://"+tb.TempDir())}
}

func (o *origin) fetch(ctx context.Context, d Digest, offset int64) (io.ReadCloser, error) {
	o.mu.Lock()
	o.offsets = append(o.offsets, offset)
	wrap := o.wrap
	o.mu.Unlock()
	r, _, err := o.store.Open(ctx, d, offset)
	if err == nil && wrap != nil {
		r = wrap(r)
	}
	return r, err
}

// asked returns the offsets since the last call.
func (o *origin) asked() []int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	offsets := o.offsets
	o.offsets = nil
	return offsets
}

// cut ends a reader with err after n bytes.
func cut(n int64, err error) func(io.ReadCloser) io.ReadCloser {
	return func(r io.ReadCloser) io.ReadCloser {
		return readCloser{io.MultiReader(io.LimitReader(r, n), iotest.ErrReader(err)), r}
	}
}

type readCloser struct {
	io.Reader
	io.Closer
}

func never(context.Context, Digest, int64) (io.ReadCloser, error) {
	return nil, errors.New("nothing was to be fetched")
}

// mustGet gets b and checks the file it is handed.
func mustGet(tb testing.TB, c *Cache, b []byte, fetch Fetch) (path string, release func()) {
	tb.Helper()
	path, release, err := c.Get(tb.Context(), Sum(b), int64(len(b)), fetch)
	if err != nil {
		tb.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o444 {
		tb.Errorf("file %v, %v; want mode 0444", info, err)
	}
	if !bytes.Equal(mustRead(tb, path), b) {
		tb.Errorf("%s holds other bytes than were asked for", path)
	}
	return path, release
}

func has(c *Cache, b []byte) bool {
	_, err := os.Stat(c.path(Sum(b)))
	return err == nil
}

func TestGet(t *testing.T) {
	o, c := newOrigin(t), mustOpenCache(t, filepath.Join(t.TempDir(), "a", "cache"), 10<<20)
	for i, n := range []int{0, 1, 100, copyBuffer, 3<<20 + 1} {
		b := random(uint64(i), n)
		mustPut(t, o.store, b)
		path, release := mustGet(t, c, b, o.fetch)
		again, releaseAgain := mustGet(t, c, b, never)
		if path != again {
			t.Errorf("paths %s and %s for one blob", path, again)
		}
		release()
		release() // more than once is harmless
		releaseAgain()
		mustBeSound(t, c)
	}
}

func TestCacheMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	c, err := OpenCache(t.TempDir(), 250, slog.New(slog.DiscardHandler), reg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	o := newOrigin(t)
	for i := range 3 { // the third takes the place of the first
		b := random(uint64(i), 100)
		mustPut(t, o.store, b)
		_, release := mustGet(t, c, b, o.fetch)
		release()
		_, release = mustGet(t, c, b, never)
		release()
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		m := f.GetMetric()[0]
		got[f.GetName()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
	}
	want := map[string]float64{
		"rxvision_blob_cache_hits_total":      3,
		"rxvision_blob_cache_downloads_total": 3,
		"rxvision_blob_cache_evictions_total": 1,
		"rxvision_blob_cache_bytes":           200,
		"rxvision_blob_cache_limit_bytes":     250,
	}
	if !maps.Equal(got, want) {
		t.Errorf("metrics %v, want %v", got, want)
	}
}

func TestGetRefuses(t *testing.T) {
	c := mustOpenCache(t, t.TempDir(), 1000)
	gone := errors.New("gone")
	for _, test := range []struct {
		d         Digest
		size      int64
		want      error
		complaint string
	}{
		{Digest{}, 1, nil, "no digest"},
		{Sum(nil), -1, nil, "negative"},
		{Sum(nil), 1001, ErrTooLarge, "may hold 1000"},
		{Sum(nil), 1000, gone, "fetch at 0"},
	} {
		_, release, err := c.Get(t.Context(), test.d, test.size, func(context.Context, Digest, int64) (io.ReadCloser, error) {
			return nil, gone
		})
		if err == nil || release != nil || !strings.Contains(err.Error(), test.complaint) || test.want != nil && !errors.Is(err, test.want) {
			t.Errorf("Get(%s, %d) = %v, want %v with %q", test.d, test.size, err, test.want, test.complaint)
		}
	}
	if files, err := os.ReadDir(c.dir); err != nil || len(files) != 1 || len(c.entries) != 0 {
		t.Errorf("left behind: %v, %v, %v", files, c.entries, err)
	}
}

func TestInterruptedDownloadResumes(t *testing.T) {
	dir := t.TempDir()
	o, c := newOrigin(t), mustOpenCache(t, dir, 10<<20)
	b := random(1, 1<<20)
	d := mustPut(t, o.store, b)
	reset := errors.New("connection reset")
	var want []int64
	for _, step := range []struct {
		bytes int64
		end   error
		seen  error
	}{{300_000, reset, reset}, {0, reset, reset}, {500_000, io.EOF, io.ErrUnexpectedEOF}, {1, io.EOF, io.ErrUnexpectedEOF}} {
		var sum int64
		if info, err := os.Stat(c.path(d) + partialSuffix); err == nil {
			sum = info.Size()
		}
		want = append(want, sum)
		o.wrap = cut(step.bytes, step.end)
		if _, _, err := c.Get(t.Context(), d, int64(len(b)), o.fetch); !errors.Is(err, step.seen) {
			t.Fatalf("Get = %v, want %v", err, step.seen)
		}
		if has(c, b) {
			t.Fatal("an unfinished blob is in the cache under its name")
		}
		mustBeSound(t, c)
	}
	if err := c.Close(); err != nil { // the restart
		t.Fatal(err)
	}
	c = mustOpenCache(t, dir, 10<<20)
	o.wrap = nil
	_, release := mustGet(t, c, b, o.fetch)
	release()
	want = append(want, 800_001)
	if got := o.asked(); !slices.Equal(got, want) || !slices.Equal(got, []int64{0, 300_000, 300_000, 800_000, 800_001}) {
		t.Errorf("offsets asked for: %v, want %v", got, want)
	}
}

// TestDownloadOverHTTP has a server that breaks the connection in the middle.
func TestDownloadOverHTTP(t *testing.T) {
	o, c := newOrigin(t), mustOpenCache(t, t.TempDir(), 10<<20)
	b := random(2, 1<<20)
	d := mustPut(t, o.store, b)
	var requests atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var offset int64
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &offset); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		body, size, err := o.store.Open(r.Context(), d, offset)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer body.Close()
		w.Header().Set("Content-Length", fmt.Sprint(size-offset))
		w.WriteHeader(http.StatusPartialContent)
		if requests.Add(1) == 1 {
			_, _ = io.CopyN(w, body, 400_000)
			panic(http.ErrAbortHandler)
		}
		_, _ = io.Copy(w, body)
	}))
	defer server.Close()
	var offsets []int64
	fetch := func(ctx context.Context, d Digest, offset int64) (io.ReadCloser, error) {
		offsets = append(offsets, offset)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL, nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		resp, err := server.Client().Do(req)
		if err != nil {
			return nil, err
		}
		return resp.Body, nil
	}
	if _, _, err := c.Get(t.Context(), d, int64(len(b)), fetch); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("Get over a broken connection: %v", err)
	}
	_, release := mustGet(t, c, b, fetch)
	release()
	if len(offsets) != 2 || offsets[0] != 0 || offsets[1] <= 0 || offsets[1] > 400_000 {
		t.Errorf("offsets asked for: %v, want 0 and one within the first 400000 bytes", offsets)
	}
}

func TestWrongBytesAreDeleted(t *testing.T) {
	b, other := random(1, 100_000), random(2, 100_000)
	var longer, flipped []byte
	longer = append(longer, b...)
	longer = append(longer, 'x')
	flipped = append(flipped, b...)
	flipped[99_999] ^= 1
	for name, test := range map[string]struct {
		partial, served []byte
		names           string // what the message must have beside the digest wanted
	}{
		"other bytes":         {nil, other, Sum(other).String()},
		"last bit flipped":    {nil, flipped, Sum(flipped).String()},
		"more bytes":          {nil, longer, "more"},
		"damaged partial":     {other[:5000], b, ", got sha256:"},
		"whole wrong partial": {other, b, Sum(other).String()},
		"partial too long":    {longer, b, "more"},
		"offset ignored":      {b[:5000], append(make([]byte, 5000), b...), "more"},
	} {
		t.Run(name, func(t *testing.T) {
			c := mustOpenCache(t, t.TempDir(), 1<<20)
			partial := c.path(Sum(b)) + partialSuffix
			if err := os.WriteFile(partial, test.partial, 0o600); err != nil {
				t.Fatal(err)
			}
			serve := func(_ context.Context, _ Digest, offset int64) (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(test.served[offset:])), nil
			}
			_, _, err := c.Get(t.Context(), Sum(b), int64(len(b)), serve)
			if !errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), Sum(b).String()) || !strings.Contains(err.Error(), test.names) {
				t.Fatalf("Get = %v; want ErrDigest with %s and %s", err, Sum(b), test.names)
			}
			if _, err := os.Stat(partial); !errors.Is(err, os.ErrNotExist) || has(c, b) {
				t.Errorf("the wrong bytes are still there: %v", err)
			}
			mustBeSound(t, c)
			_, release := mustGet(t, c, b, func(_ context.Context, _ Digest, offset int64) (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(b[offset:])), nil
			})
			release()
		})
	}
}

func TestCompletePartialNeedsNoFetch(t *testing.T) {
	c := mustOpenCache(t, t.TempDir(), 1<<20)
	b := random(1, 5000)
	if err := os.WriteFile(c.path(Sum(b))+partialSuffix, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, release := mustGet(t, c, b, never)
	release()
}

func TestRestartVerifiesAgain(t *testing.T) {
	dir := t.TempDir()
	o, c := newOrigin(t), mustOpenCache(t, dir, 1<<20)
	good, bad := random(1, 100_000), random(2, 100_000)
	for _, b := range [][]byte{good, bad} {
		mustPut(t, o.store, b)
		_, release := mustGet(t, c, b, o.fetch)
		release()
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	spoil(t, c.path(Sum(bad)))
	o.asked()

	c = mustOpenCache(t, dir, 1<<20)
	_, release := mustGet(t, c, good, never)
	release()
	_, release = mustGet(t, c, bad, o.fetch)
	release()
	if got := o.asked(); !slices.Equal(got, []int64{0}) {
		t.Errorf("offsets asked for: %v, want the damaged blob from its start", got)
	}
}

func TestForeignHands(t *testing.T) {
	o, c := newOrigin(t), mustOpenCache(t, t.TempDir(), 1<<20)
	b := random(1, 100_000)
	mustPut(t, o.store, b)
	path, release := mustGet(t, c, b, o.fetch)
	for name, harm := range map[string]func(){
		"overwritten": func() { spoil(t, path) },
		"removed": func() {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
	} {
		o.asked()
		harm()
		_, again := mustGet(t, c, b, o.fetch)
		again()
		if got := o.asked(); !slices.Equal(got, []int64{0}) {
			t.Errorf("%s: offsets asked for: %v, want all of it again", name, got)
		}
	}
	release()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Get(t.Context(), Sum(b), int64(len(b)), never); err == nil {
		t.Error("Get of a file that is gone succeeds")
	}
	mustBeSound(t, c)
}

// spoil changes one byte of a file, not its length.
func spoil(tb testing.TB, path string) {
	tb.Helper()
	b := mustRead(tb, path)
	b[len(b)/2] ^= 1
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, b, 0o600)); err != nil {
		tb.Fatal(err)
	}
}

func TestEviction(t *testing.T) {
	dir := t.TempDir()
	o, c := newOrigin(t), mustOpenCache(t, dir, 400)
	var blobs [][]byte
	for i := range 6 {
		blobs = append(blobs, random(uint64(i), 100))
		mustPut(t, o.store, blobs[i])
	}
	get := func(i int) func() {
		t.Helper()
		_, release := mustGet(t, c, blobs[i], o.fetch)
		mustBeSound(t, c)
		return release
	}
	present := func(want ...int) {
		t.Helper()
		for i, b := range blobs {
			if has(c, b) != slices.Contains(want, i) {
				t.Errorf("blob %d present: %t, want those present to be %v", i, has(c, b), want)
			}
		}
	}
	hold := get(0)
	for i := 1; i < 4; i++ {
		get(i)()
	}
	present(0, 1, 2, 3)
	get(1)() // used again: 2 is now the oldest that nobody holds
	get(4)()
	present(0, 1, 3, 4)
	get(5)()
	present(0, 1, 4, 5)
	hold() // the end of a use counts as one
	get(2)()
	present(0, 2, 4, 5)
	get(4)()

	// The order of the last Gets, 0 5 2 4, outlives a restart, and a lower limit is enforced by it.
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = mustOpenCache(t, dir, 299)
	present(2, 4)
	a, b := get(2), get(4)
	if _, _, err := c.Get(t.Context(), Sum(blobs[0]), 100, o.fetch); !errors.Is(err, ErrCacheFull) {
		t.Errorf("Get while all is in use: %v, want ErrCacheFull", err)
	}
	present(2, 4)
	a()
	get(0)()
	present(0, 4)
	b()
}

func TestNothingIsEvictedInVain(t *testing.T) {
	o, c := newOrigin(t), mustOpenCache(t, t.TempDir(), 300)
	held, idle, wanted := random(1, 200), random(2, 100), random(3, 101)
	for _, b := range [][]byte{held, idle, wanted} {
		mustPut(t, o.store, b)
	}
	_, release := mustGet(t, c, held, o.fetch)
	defer release()
	_, releaseIdle := mustGet(t, c, idle, o.fetch)
	releaseIdle()
	if _, _, err := c.Get(t.Context(), Sum(wanted), 101, o.fetch); !errors.Is(err, ErrCacheFull) {
		t.Errorf("Get = %v, want ErrCacheFull", err)
	}
	if !has(c, idle) {
		t.Error("a blob was evicted although that could not make enough room")
	}
}

func TestPartialsCountAndAreEvicted(t *testing.T) {
	dir := t.TempDir()
	o, c := newOrigin(t), mustOpenCache(t, dir, 1000)
	first, second := random(1, 900), random(2, 500)
	d := mustPut(t, o.store, first)
	mustPut(t, o.store, second)
	o.wrap = cut(600, io.EOF)
	if _, _, err := c.Get(t.Context(), d, 900, o.fetch); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = mustOpenCache(t, dir, 1000)
	if c.used != 600 {
		t.Errorf("%d bytes in use after the restart, want the 600 of the unfinished download", c.used)
	}
	o.wrap = nil
	_, release := mustGet(t, c, second, o.fetch)
	defer release()
	if _, err := os.Stat(c.path(d) + partialSuffix); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the unfinished download is still there: %v", err)
	}
}

func TestConcurrentGetsDownloadOnce(t *testing.T) {
	for name, spoiled := range map[string]bool{"good": false, "corrupt": true} {
		t.Run(name, func(t *testing.T) {
			o, c := newOrigin(t), mustOpenCache(t, t.TempDir(), 1<<20)
			b := random(1, 200_000)
			d := mustPut(t, o.store, b)
			const callers = 16
			var first sync.Once
			o.wrap = func(r io.ReadCloser) io.ReadCloser {
				first.Do(func() {
					await(t, "all callers want the blob", func() bool {
						c.mu.Lock()
						defer c.mu.Unlock()
						return c.entries[d].pins == callers
					})
				})
				if spoiled {
					return readCloser{bytes.NewReader(make([]byte, len(b))), r}
				}
				return r
			}
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					path, release, err := c.Get(t.Context(), d, int64(len(b)), o.fetch)
					if spoiled {
						if !errors.Is(err, ErrDigest) {
							t.Errorf("Get = %v, want ErrDigest", err)
						}
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					defer release()
					if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, b) {
						t.Errorf("read %d bytes, %v", len(got), err)
					}
				})
			}
			wg.Wait()
			// Who comes after a download has failed tries one of his own.
			if got := o.asked(); !spoiled && len(got) != 1 || len(got) > callers || slices.Max(got) != 0 {
				t.Errorf("offsets asked for: %v, want one download from the beginning", got)
			}
			if e := c.entries[d]; !spoiled && e.pins != 0 || spoiled && e != nil {
				t.Errorf("entry afterwards: %+v", e)
			}
		})
	}
}

func TestAnotherCallerTakesOver(t *testing.T) {
	o, c := newOrigin(t), mustOpenCache(t, t.TempDir(), 1<<20)
	b := random(1, 200_000)
	d := mustPut(t, o.store, b)
	pins := func(n int) func() bool {
		return func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.entries[d] != nil && c.entries[d].pins == n
		}
	}
	leaving, leave := context.WithCancel(t.Context())
	stuck := func(ctx context.Context, d Digest, offset int64) (io.ReadCloser, error) {
		r, err := o.fetch(ctx, d, offset)
		if err != nil {
			return nil, err
		}
		return readCloser{io.MultiReader(io.LimitReader(r, 50_000), readerFunc(func([]byte) (int, error) {
			await(t, "the second and third caller wait", pins(3))
			leave()
			return 0, context.Cause(ctx)
		})), r}, nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, _, err := c.Get(leaving, d, int64(len(b)), stuck); !errors.Is(err, context.Canceled) {
			t.Errorf("the caller that left: %v", err)
		}
	})
	await(t, "the first download begins", pins(1))
	wg.Go(func() { // gives up while it waits, or takes over and gives up at once
		if _, _, err := c.Get(leaving, d, int64(len(b)), o.fetch); !errors.Is(err, context.Canceled) {
			t.Errorf("the caller that left while waiting: %v", err)
		}
	})
	wg.Go(func() {
		_, release, err := c.Get(t.Context(), d, int64(len(b)), o.fetch)
		if err != nil {
			t.Errorf("the caller that stayed: %v", err)
			return
		}
		release()
	})
	wg.Wait()
	if got := o.asked(); !slices.Equal(got, []int64{0, 50_000}) {
		t.Errorf("offsets asked for: %v, want the second caller to go on at 50000", got)
	}
	if !has(c, b) {
		t.Error("the blob is not there")
	}
}

func TestKilledGet(t *testing.T) {
	dir := t.TempDir()
	o := newOrigin(t)
	b := random(1, 1<<20)
	d := mustPut(t, o.store, b)
	child := mustStart(t, "get", dir, d.String())
	child.feed(t, b[:400_000])
	if _, err := OpenCache(dir, 1<<30, slog.New(slog.DiscardHandler), nil); !errors.Is(err, ErrLocked) {
		t.Errorf("OpenCache of a folder in use: %v, want ErrLocked", err)
	}
	child.kill()
	c := mustOpenCache(t, dir, 10<<20)
	if has(c, b) {
		t.Error("a killed download left a file under the blob's name")
	}
	_, release := mustGet(t, c, b, o.fetch)
	release()
	if got := o.asked(); !slices.Equal(got, []int64{400_000}) {
		t.Errorf("offsets asked for: %v, want to go on where the killed process was", got)
	}
}

func TestOpenCacheComplains(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	if _, err := OpenCache(t.TempDir(), 0, log, nil); err == nil {
		t.Error("a limit of 0 is accepted")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCache(file, 1, log, nil); err == nil {
		t.Error("a file is accepted for a folder")
	}
	reg := prometheus.NewRegistry()
	c, err := OpenCache(t.TempDir(), 1, log, reg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	dir := t.TempDir()
	if _, err := OpenCache(dir, 1, log, reg); err == nil {
		t.Error("metrics are registered twice")
	}
	mustOpenCache(t, dir, 1) // the failed one has let go of the lock
}

func TestForeignFilesAreLeftAlone(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "notes.txt"), []byte("not ours"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := mustOpenCache(t, dir, 4)
	if c.used != 0 || string(mustRead(t, filepath.Join(dir, "notes.txt"))) != "not ours" {
		t.Errorf("%d bytes in use", c.used)
	}
}

// TestCacheUnderStress has many callers on few blobs in too small a cache, with sources that break, lie and stall.
func TestCacheUnderStress(t *testing.T) {
	const seed, callers, rounds = 42, 12, 60
	o, c := newOrigin(t), mustOpenCache(t, t.TempDir(), 400_000)
	var blobs [][]byte
	for i := range 10 {
		blobs = append(blobs, random(uint64(i), 20_000*(i+1)))
		mustPut(t, o.store, blobs[i])
	}
	var handed atomic.Int64
	var wg sync.WaitGroup
	for id := range callers {
		rng := rand.New(rand.NewPCG(seed, uint64(id)))
		wg.Go(func() {
			for range rounds {
				b := blobs[rng.IntN(len(blobs))]
				ctx, cancel := context.WithCancel(t.Context())
				mood, at := rng.IntN(5), rng.Int64N(int64(len(b)))
				path, release, err := c.Get(ctx, Sum(b), int64(len(b)), func(ctx context.Context, d Digest, offset int64) (io.ReadCloser, error) {
					r, err := o.fetch(ctx, d, offset)
					switch {
					case err != nil:
						return nil, err
					case mood == 0:
						return cut(at, io.EOF)(r), nil
					case mood == 1:
						return readCloser{bytes.NewReader(make([]byte, int64(len(b))-offset)), r}, nil
					case mood == 2:
						return readCloser{io.MultiReader(io.LimitReader(r, at), readerFunc(func([]byte) (int, error) {
							cancel()
							return 0, nil
						})), r}, nil
					}
					return r, nil
				})
				cancel()
				switch {
				case err == nil:
					handed.Add(1)
					if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, b) {
						t.Errorf("handed out %d bytes, %v; want the %d of %s", len(got), err, len(b), Sum(b))
					}
					release()
				case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, ErrDigest), errors.Is(err, ErrCacheFull), errors.Is(err, context.Canceled):
				default:
					t.Errorf("unexpected: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if handed.Load() == 0 {
		t.Error("no Get succeeded: the test shows nothing")
	}
	t.Logf("seed %d: %d of %d Gets succeeded", seed, handed.Load(), callers*rounds)
	for _, e := range c.entries {
		if e.pins != 0 {
			t.Errorf("%s is still held", e.digest)
		}
	}
}
