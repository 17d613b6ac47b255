package raftstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/rxvision/rxvision/cluster"
)

// A snapshot is one bbolt file with a bucket for each table: the record's key →
// the record as cluster.AppendStored writes it, followed by a CRC-32C over table, key
// and record. The bucket "meta" holds, as plain text for whoever opens the file
// with other tools: format, index, term, created_by, and count/TABLE.
const (
	snapshotFormat = "2" // 1: allocations as cluster.Marshal gives them, which 2 reads too
	metaBucket     = "meta"
	countPrefix    = "count/"
	// snapshotBatch bounds the bytes of records in one bbolt transaction: the log's own syncs may wait for one.
	snapshotBatch = 1 << 20
	// snapshotPage is the size of the file's pages: several records fit in one.
	snapshotPage = 16 << 10
)

// snapshotHead says where a snapshot stands and who wrote it.
type snapshotHead struct {
	Index, Term uint64 // of the last command in it
	CreatedBy   string
}

func recordSum(table string, key, record []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte(table))
	sum = crc32.Update(sum, castagnoli, []byte{0})
	sum = crc32.Update(sum, castagnoli, key)
	sum = crc32.Update(sum, castagnoli, []byte{0})
	return crc32.Update(sum, castagnoli, record)
}

var errStopped = errors.New("stopped because the server is shutting down")

// snapshotWriter makes a snapshot file out of records. It syncs a batch at a time,
// because a file system may let a sync of the log wait for all that is unwritten of
// other files; the end of the file is synced by who keeps it.
type snapshotWriter struct {
	db      *bbolt.DB
	tx      *bbolt.Tx
	counts  map[string]int
	written []byte // the records of this transaction
}

// createSnapshot begins a file; finish or abort must follow.
func createSnapshot(path string) (*snapshotWriter, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		PageSize: snapshotPage, NoSync: true, NoGrowSync: true, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
	})
	if err != nil {
		return nil, err
	}
	w := &snapshotWriter{db: db, counts: map[string]int{}}
	if w.tx, err = db.Begin(true); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	for _, t := range cluster.Tables {
		if _, err := w.tx.CreateBucket([]byte(t.Name)); err != nil {
			return nil, errors.Join(err, w.abort())
		}
	}
	return w, nil
}

// put writes one record. It keeps nothing of it.
func (w *snapshotWriter) put(t *cluster.Table, key string, record []byte) error {
	return w.add(t, key, func(b []byte) []byte { return append(b, record...) })
}

// add writes the record that encode appends.
func (w *snapshotWriter) add(t *cluster.Table, key string, encode func([]byte) []byte) error {
	if len(w.written) >= snapshotBatch {
		err := w.tx.Commit()
		if err == nil {
			err = w.db.Sync()
		}
		if err == nil {
			w.tx, err = w.db.Begin(true)
		}
		if err != nil {
			return err
		}
		w.written = w.written[:0]
	}
	// bbolt keeps the value until the end of the transaction: should written grow, it stays where it was.
	begin := len(w.written)
	w.written = encode(w.written)
	w.written = binary.BigEndian.AppendUint32(w.written, recordSum(t.Name, []byte(key), w.written[begin:]))
	b := w.tx.Bucket([]byte(t.Name))
	b.FillPercent = 1 // keys come in order
	w.counts[t.Name]++
	if err := b.Put([]byte(key), w.written[begin:len(w.written):len(w.written)]); err != nil {
		return fmt.Errorf("table %s: record %q: %w", t.Name, key, err)
	}
	return nil
}

// finish writes the meta bucket and closes the file.
func (w *snapshotWriter) finish(head snapshotHead) error {
	meta, err := w.tx.CreateBucket([]byte(metaBucket))
	if err != nil {
		return errors.Join(err, w.abort())
	}
	put := func(key, value string) { err = errors.Join(err, meta.Put([]byte(key), []byte(value))) }
	put("format", snapshotFormat)
	put("index", strconv.FormatUint(head.Index, 10))
	put("term", strconv.FormatUint(head.Term, 10))
	put("created_by", head.CreatedBy)
	for _, t := range cluster.Tables {
		put(countPrefix+t.Name, strconv.Itoa(w.counts[t.Name]))
	}
	if err == nil {
		err = w.tx.Commit()
	}
	return errors.Join(err, w.abort())
}

// abort closes the file as it is.
func (w *snapshotWriter) abort() error {
	if w.tx != nil {
		_ = w.tx.Rollback() // nothing after Commit
	}
	return w.db.Close()
}

// pace keeps a long piece of work out of the way of writes: while they come, it rests
// paceShare times as long as it has worked.
type pace struct {
	applied func() uint64 // an index that moves with writes
	last    uint64
	moved   time.Time // when it was last seen to have moved
	bytes   int
	since   time.Time
}

const (
	paceBytes = 64 << 10 // of work, between two rests
	paceShare = 2
	paceRest  = 10 * time.Millisecond  // the longest
	paceQuiet = 100 * time.Millisecond // without a write, after which there is no rest
)

// did counts work in bytes, and rests when it is time. A nil pace never does.
func (p *pace) did(bytes int) {
	if p == nil {
		return
	}
	if p.bytes += bytes; p.bytes < paceBytes {
		return
	}
	p.bytes = 0
	now := time.Now()
	if applied := p.applied(); applied != p.last {
		p.last, p.moved = applied, now
	}
	if now.Sub(p.moved) < paceQuiet {
		time.Sleep(min(paceShare*now.Sub(p.since), paceRest))
		now = time.Now()
	}
	p.since = now
}

// writeSnapshot writes the view to a new bbolt file.
func writeSnapshot(path string, snap *cluster.Snapshot, head snapshotHead, slow *pace, closing <-chan struct{}) error {
	w, err := createSnapshot(path)
	if err != nil {
		return err
	}
	before := 0 // bytes in this transaction
	err = snap.Records(func(t *cluster.Table, key string, record any) error {
		slow.did(max(len(w.written)-before, 0))
		before = len(w.written)
		select {
		case <-closing:
			return errStopped
		default:
			return w.add(t, key, func(b []byte) []byte { return cluster.AppendStored(b, record) })
		}
	})
	if err != nil {
		return errors.Join(err, w.abort())
	}
	return w.finish(head)
}

// readSnapshot loads a snapshot file: every checksum right, every count right,
// the state whole; or an error.
func readSnapshot(path string) (*cluster.State, snapshotHead, error) {
	var head snapshotHead
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if err != nil {
		return nil, head, fmt.Errorf("snapshot file %s: %w", path, err)
	}
	defer db.Close()
	var state *cluster.State
	err = db.View(func(tx *bbolt.Tx) error {
		counts, err := readMeta(tx, &head)
		if err != nil {
			return err
		}
		load := newLoader(nil)
		for _, t := range cluster.Tables {
			if err := readTable(tx.Bucket([]byte(t.Name)), t, counts[t.Name], load); err != nil {
				return errors.Join(err, load.stop())
			}
		}
		state, err = load.finish(head)
		return err
	})
	if err != nil {
		return nil, head, fmt.Errorf("snapshot file %s: %w", path, err)
	}
	return state, head, nil
}

// readMeta reads the head and the number of records of each table.
func readMeta(tx *bbolt.Tx, head *snapshotHead) (map[string]int, error) {
	meta := tx.Bucket([]byte(metaBucket))
	if meta == nil {
		return nil, errors.New("has no meta bucket: no snapshot of rxvision")
	}
	if f := string(meta.Get([]byte("format"))); f != snapshotFormat && f != "1" {
		return nil, fmt.Errorf("format %q; this version of rxvision reads format %s", f, snapshotFormat)
	}
	var err error
	number := func(key string, text []byte) uint64 {
		n, e := strconv.ParseUint(string(text), 10, 63)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("meta %s: %w", key, e))
		}
		return n
	}
	head.Index = number("index", meta.Get([]byte("index")))
	head.Term = number("term", meta.Get([]byte("term")))
	head.CreatedBy = string(meta.Get([]byte("created_by")))
	counts := map[string]int{}
	for _, t := range cluster.Tables {
		counts[t.Name] = 0
	}
	c := meta.Cursor()
	for k, v := c.Seek([]byte(countPrefix)); bytes.HasPrefix(k, []byte(countPrefix)); k, v = c.Next() {
		table := string(k[len(countPrefix):])
		if _, known := counts[table]; !known {
			err = errors.Join(err, fmt.Errorf("table %s is not known to this version of rxvision; a newer one wrote the file", table))
		}
		counts[table] = int(number(string(k), v))
	}
	return counts, err
}

func readTable(b *bbolt.Bucket, t *cluster.Table, want int, load *loader) error {
	got := 0
	if b != nil { // a table that did not exist when the file was written is empty
		err := b.ForEach(func(k, v []byte) error {
			if err := checkRecord(t, k, v); err != nil {
				return err
			}
			got++
			return load.add(t, v[:len(v)-crc32.Size])
		})
		if err != nil {
			return err
		}
	}
	if got != want {
		return fmt.Errorf("table %s holds %d records, its count says %d", t.Name, got, want)
	}
	return nil
}

// persister is a view on its way into a raft snapshot.
type persister struct {
	fsm  *fsm
	snap *cluster.Snapshot
	head snapshotHead
}

// Persist implements raft.FSMSnapshot; it runs beside further Applies.
func (p *persister) Persist(sink raft.SnapshotSink) error {
	start := time.Now()
	err := p.write(sink)
	if err != nil {
		_ = sink.Cancel() // what it could say is said by err
		return fmt.Errorf("write snapshot: %w", err)
	}
	p.fsm.metrics.snapshots.Observe(time.Since(start).Seconds())
	return nil // raft closes the sink, which syncs it
}

// write makes the bbolt file where the snapshot will stay.
func (p *persister) write(sink raft.SnapshotSink) error {
	s, ok := sink.(*snapshotSink)
	if !ok {
		return fmt.Errorf("snapshot goes to %T, not to this store", sink)
	}
	if err := writeSnapshot(s.inPlace(), p.snap, p.head, &pace{applied: p.fsm.appliedIndex}, p.fsm.closing); err != nil {
		return err
	}
	stat, err := s.file.Stat()
	if err == nil {
		p.fsm.metrics.size.Set(float64(stat.Size()))
		p.fsm.wrote(int(stat.Size()))
	}
	return err
}

// Release implements raft.FSMSnapshot.
func (p *persister) Release() {}

// temp is a file that is deleted after use. What is written in order goes to the disk a
// batch at a time, for the reason that snapshotWriter has.
type temp struct {
	*os.File
	size, sent int64
}

func tempFile(dir, prefix string) (*temp, error) {
	f, err := os.CreateTemp(dir, prefix)
	return &temp{File: f}, err
}

// Write implements io.Writer.
func (t *temp) Write(b []byte) (int, error) {
	n, err := t.File.Write(b)
	t.size += int64(n)
	if batch := t.size - t.sent; err == nil && batch >= snapshotBatch {
		// Without a sync, which would make the log's own wait: after a crash nobody needs the file.
		_ = unix.SyncFileRange(int(t.Fd()), t.sent, batch, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		t.sent = t.size
	}
	return n, err
}

func (t *temp) remove() error { return errors.Join(t.Close(), os.Remove(t.Name())) }

// restoreSource reads the snapshot that raft hands to the FSM.
func restoreSource(source io.ReadCloser) (_ *cluster.State, _ snapshotHead, members uint64, size int, err error) {
	if w, ok := source.(raft.ReadCloserWrapper); ok {
		source = w.WrappedReadCloser()
	}
	s, ok := source.(snapshotSource)
	if !ok {
		return nil, snapshotHead{}, 0, 0, fmt.Errorf("snapshot comes as %T, not from this store", source)
	}
	var state *cluster.State
	var head snapshotHead
	if p := s.ready; p != nil {
		state, head = p.state, p.head
	} else {
		state, head, err = readSnapshot(s.path)
	}
	// Who waits for this snapshot waits for raft's index: after a restore on the
	// leader nothing else tells the new state from the old.
	head.Index = max(head.Index, s.index)
	if stat, e := os.Stat(s.path); e == nil {
		size = int(stat.Size())
	}
	return state, head, s.members, size, err
}

// snapshotWhenDue asks raft for a snapshot when much has been applied; raft's own
// rule knows only the number of entries. That number grows with large snapshots, as
// the number of bytes does.
func (s *Store) snapshotWhenDue() {
	for {
		select {
		case size := <-s.fsm.sized:
			conf := s.raft.ReloadableConfig()
			conf.SnapshotThreshold = s.cfg.SnapshotThreshold * uint64(max(1, size/snapshotBytes))
			if err := s.raft.ReloadConfig(conf); err != nil {
				s.log.Warn("snapshots stay as frequent as they were", "error", err)
			}
		case <-s.fsm.due:
			if !s.fsm.snapshotDue() {
				continue // it was taken meanwhile
			}
			if err := s.Snapshot(); err != nil {
				s.log.Warn("snapshot failed; the log is kept and it is tried again later", "error", err)
			}
		case <-s.closing:
			return
		}
	}
}

// Snapshot writes a snapshot now and shortens the log. Nothing new to write is
// no error.
func (s *Store) Snapshot() error {
	end, err := s.begin()
	if err != nil {
		return err
	}
	defer end()
	err = s.settle(func() error { return s.raft.Snapshot().Error() })
	if err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}
