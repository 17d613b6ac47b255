package raftstore

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
	"go.etcd.io/bbolt"
)

// The stores of the log. A data folder keeps the one that it was made with.
const (
	LogBbolt = "bbolt" // one bbolt file; two fsyncs for each batch of entries
	LogWAL   = "wal"   // segments of hashicorp/raft-wal; one fsync
	// DefaultLogStore was the faster by BenchmarkLogStore.
	DefaultLogStore = LogWAL

	boltLogFile = "log.db"
	walFolder   = "log"
	// walSegment is the size of one segment in bytes, allocated as a whole. Small
	// enough for small disks, large enough that new ones are rare.
	walSegment = 16 << 20
)

// logStore is one store of the log. Errors of reads may be a *Damage.
type logStore interface {
	raft.LogStore
	// Ready tries to be able to write again after a write had failed for lack of space.
	Ready() error
	// Where names the file that an entry lies in, as far as is known.
	Where(index uint64) string
	Close() error
}

// openLog opens the log of the given kind, or makes it. New segments have the
// given size.
func openLog(kind, dir string, st *stable, segment int, l *slog.Logger, readOnly bool) (logStore, error) {
	if kind == LogBbolt {
		b, err := openBoltLog(dir, readOnly)
		if err != nil {
			return nil, err // not a nil of a type
		}
		return b, nil
	}
	w, err := openWAL(dir, st, segment, l, readOnly)
	if err != nil {
		return nil, err
	}
	return w, nil
}

// An entry lies in either store as: CRC-32C of the rest (4 bytes), index, term,
// time of its first append (8 bytes each), type (1 byte), length of the data (4
// bytes), data, extensions.
const entryHead = crc32.Size + 3*8 + 1 + 4

func packEntry(l *raft.Log) []byte {
	b := make([]byte, crc32.Size, entryHead+len(l.Data)+len(l.Extensions))
	b = binary.BigEndian.AppendUint64(b, l.Index)
	b = binary.BigEndian.AppendUint64(b, l.Term)
	var appended int64 // 0 for none
	if !l.AppendedAt.IsZero() {
		appended = l.AppendedAt.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(appended))
	b = append(b, byte(l.Type))
	b = binary.BigEndian.AppendUint32(b, uint32(len(l.Data)))
	b = append(append(b, l.Data...), l.Extensions...)
	binary.BigEndian.PutUint32(b, crc32.Checksum(b[crc32.Size:], castagnoli))
	return b
}

// unpackEntry checks and reads what packEntry wrote. It keeps nothing of b.
func unpackEntry(b []byte, l *raft.Log) error {
	if len(b) < entryHead {
		return fmt.Errorf("has only %d bytes", len(b))
	}
	if got, want := crc32.Checksum(b[crc32.Size:], castagnoli), binary.BigEndian.Uint32(b); got != want {
		return fmt.Errorf("does not match its checksum (%08x, recorded %08x)", got, want)
	}
	number := func(at int) uint64 { return binary.BigEndian.Uint64(b[crc32.Size+8*at:]) }
	*l = raft.Log{Index: number(0), Term: number(1), Type: raft.LogType(b[entryHead-5])}
	if appended := int64(number(2)); appended != 0 {
		l.AppendedAt = time.Unix(0, appended)
	}
	n := int(binary.BigEndian.Uint32(b[entryHead-4:]))
	if n > len(b)-entryHead {
		return fmt.Errorf("is cut short")
	}
	body := slices.Clone(b[entryHead:])
	if n > 0 {
		l.Data = body[:n:n]
	}
	if n < len(body) {
		l.Extensions = body[n:]
	}
	return nil
}

// guard calls f and makes an error of the panic or the memory fault that a
// damaged file can lead bbolt and raft-wal to.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("its structure is damaged (%v)", p)
		}
	}()
	return f()
}

// boltLog is the log in one bbolt file: index → entry, in one bucket.
type boltLog struct {
	db *bbolt.DB
}

var logBucket = []byte("log")

func boltOptions(readOnly bool) *bbolt.Options {
	opts := *bbolt.DefaultOptions
	opts.Timeout = lockTimeout
	opts.NoFreelistSync = true // found again by a scan at open, cheaper than writing it with each commit
	opts.FreelistType = bbolt.FreelistMapType
	opts.ReadOnly = readOnly
	return &opts
}

func openBoltLog(dir string, readOnly bool) (*boltLog, error) {
	path := filepath.Join(dir, boltLogFile)
	b := &boltLog{}
	err := guard(func() (err error) {
		if !readOnly {
			if err := copyBoltLog(path); err != nil {
				return err
			}
		} else if err := checkPages(path); err != nil {
			return err
		}
		b.db, err = bbolt.Open(path, 0o600, boltOptions(readOnly))
		return err
	})
	if err != nil && !isSystem(err) {
		err = &Damage{File: path, What: "the bbolt file", Cause: err}
	}
	return b, err
}

// copyBoltLog moves the entries to a fresh file. For writing, bbolt goes through
// all pages in a goroutine of its own, where a damaged one would end the process
// without a word; to read a file it needs no more than checkPages has seen.
func copyBoltLog(path string) error {
	fresh, err := bbolt.Open(path+tmpSuffix, 0o600, &bbolt.Options{NoSync: true, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = fresh.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket(logBucket)
		return err
	})
	if stat, e := os.Stat(path); e == nil && stat.Size() > 0 && err == nil {
		err = copyEntries(fresh, path)
	}
	if err = errors.Join(err, fresh.Sync(), fresh.Close()); err != nil {
		return errors.Join(err, os.Remove(path+tmpSuffix))
	}
	return errors.Join(os.Rename(path+tmpSuffix, path), syncFolder(filepath.Dir(path)))
}

func copyEntries(to *bbolt.DB, path string) error {
	if err := checkPages(path); err != nil {
		return err
	}
	from, err := bbolt.Open(path, 0o600, boltOptions(true))
	if err != nil {
		return err
	}
	defer from.Close()
	return from.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket(logBucket)
		if bucket == nil {
			return errors.New("the bucket with the entries is gone")
		}
		c := bucket.Cursor()
		for k, v := c.First(); k != nil; {
			err := to.Update(func(tx *bbolt.Tx) error {
				fresh := tx.Bucket(logBucket)
				fresh.FillPercent = 0.95
				for size := 0; k != nil && size < snapshotBatch; k, v = c.Next() {
					if err := fresh.Put(k, v); err != nil {
						return err
					}
					size += len(v)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// view calls f with the bucket, for reading.
func (b *boltLog) view(f func(*bbolt.Bucket) error) error {
	return guard(func() error {
		return b.db.View(func(tx *bbolt.Tx) error {
			bucket := tx.Bucket(logBucket)
			if bucket == nil {
				return errors.New("the bucket with the entries is gone")
			}
			return f(bucket)
		})
	})
}

func (b *boltLog) end(seek func(*bbolt.Cursor) (k, v []byte)) (index uint64, err error) {
	err = b.view(func(bucket *bbolt.Bucket) error {
		k, _ := seek(bucket.Cursor())
		if k == nil {
			return nil
		}
		if len(k) != 8 {
			return fmt.Errorf("has the key %x", k)
		}
		index = binary.BigEndian.Uint64(k)
		return nil
	})
	return index, err
}

// FirstIndex implements raft.LogStore.
func (b *boltLog) FirstIndex() (uint64, error) { return b.end((*bbolt.Cursor).First) }

// LastIndex implements raft.LogStore.
func (b *boltLog) LastIndex() (uint64, error) { return b.end((*bbolt.Cursor).Last) }

func logKey(index uint64) []byte { return binary.BigEndian.AppendUint64(nil, index) }

// GetLog implements raft.LogStore.
func (b *boltLog) GetLog(index uint64, l *raft.Log) error {
	return b.view(func(bucket *bbolt.Bucket) error {
		v := bucket.Get(logKey(index))
		if v == nil {
			return raft.ErrLogNotFound
		}
		return unpackEntry(v, l)
	})
}

// StoreLog implements raft.LogStore.
func (b *boltLog) StoreLog(l *raft.Log) error { return b.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore: all of them or none.
func (b *boltLog) StoreLogs(logs []*raft.Log) error {
	return b.update(func(bucket *bbolt.Bucket) error {
		bucket.FillPercent = 0.95 // indexes only grow
		for _, l := range logs {
			if err := bucket.Put(logKey(l.Index), packEntry(l)); err != nil {
				return err
			}
		}
		return nil
	})
}

// update calls f with the bucket, to change it.
func (b *boltLog) update(f func(*bbolt.Bucket) error) error {
	return guard(func() error {
		return b.db.Update(func(tx *bbolt.Tx) error { return f(tx.Bucket(logBucket)) })
	})
}

// DeleteRange implements raft.LogStore.
func (b *boltLog) DeleteRange(first, last uint64) error {
	return b.update(func(bucket *bbolt.Bucket) error {
		c := bucket.Cursor()
		for k, _ := c.Seek(logKey(first)); k != nil && binary.BigEndian.Uint64(k) <= last; k, _ = c.Seek(logKey(first)) {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *boltLog) Ready() error        { return nil } // a failed transaction changed nothing
func (b *boltLog) Where(uint64) string { return b.db.Path() }
func (b *boltLog) Close() error        { return b.db.Close() }

// walLog is the log in segments of raft-wal. What raft-wal keeps in a bbolt file
// of its own, the list of segments, lies in the stable file here, where it has a
// checksum.
type walLog struct {
	dir     string
	stable  *stable
	segment int // bytes
	log     *slog.Logger
	files   *walFiles

	mu  sync.RWMutex // held for writing while wal is replaced
	wal *wal.WAL

	writing sync.Mutex
	failed  bool // the tail must be settled and raft-wal opened anew before it takes more: a write failed, or was cut short
}

func openWAL(dir string, st *stable, segment int, l *slog.Logger, readOnly bool) (*walLog, error) {
	w := &walLog{dir: filepath.Join(dir, walFolder), stable: st, segment: segment, log: l, files: &walFiles{readOnly: readOnly}}
	if !readOnly {
		if err := os.MkdirAll(w.dir, 0o700); err != nil {
			return nil, err
		}
		if err := syncFolder(dir); err != nil {
			return nil, err
		}
	}
	tail, err := w.tail()
	if err != nil {
		return nil, err
	}
	if err := w.open(); err != nil {
		return nil, err
	}
	if tail != nil {
		err = w.checkTail(*tail)
	}
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// tail is the segment that is written to; nil when the log is new.
func (w *walLog) tail() (*types.SegmentInfo, error) {
	state, err := (&walMeta{stable: w.stable}).Load("")
	if err != nil || len(state.Segments) == 0 {
		return nil, err
	}
	return &state.Segments[len(state.Segments)-1], nil
}

// checkTail tells damage from a torn write, which is one to raft-wal: it takes the
// log to end at the last batch that it can read. A torn batch is the last one, for
// the next is written when this one is on disk; a whole batch behind it says that
// entries are lost.
func (w *walLog) checkTail(tail types.SegmentInfo) error {
	path := filepath.Join(w.dir, segment.FileName(tail))
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // raft-wal makes it
	} else if err != nil {
		return err
	}
	last, err := w.LastIndex()
	if err != nil {
		return err
	}
	end := 0 // of what raft-wal believes
	for at, next := walFileHead, tail.BaseIndex; next <= last; {
		kind, size := walFrame(b, at)
		if kind == 0 {
			break
		}
		if at += size; kind == walEntry {
			next++
		}
		end = at
	}
	for at := max(end, walFileHead); at < len(b); at += walFrameHead {
		if kind, _ := walFrame(b, at); kind != walEntry {
			continue
		}
		if walBatch(b, at) {
			return &Damage{File: path, What: fmt.Sprintf("the log behind entry %d", last), Cause: fmt.Errorf("whole entries at byte %d follow others, from byte %d on, that cannot be read", at, end)}
		}
	}
	whole, _, index := walWhole(b)
	w.failed = index > 0 || whole < len(bytes.TrimRight(b, "\x00"))
	return nil
}

// Segments of raft-wal (its segment/format.go): a file header, then frames, each a
// header of type, three zeros and the length of what follows, little endian, padded
// to the size of a header. A batch is entries and, in the last one, their index; it
// ends with a commit, which has the CRC-32C of the batch in the length's place.
const (
	walFileHead  = 32
	walFrameHead = 8

	walEntry  = 1
	walIndex  = 2
	walCommit = 3
)

// walFrame reads the header of a frame; kind 0 is none that ends within b.
func walFrame(b []byte, at int) (kind byte, size int) {
	if at+walFrameHead > len(b) || b[at+1]|b[at+2]|b[at+3] != 0 {
		return 0, 0
	}
	switch kind, size = b[at], walFrameHead; kind {
	case walCommit:
	case walEntry, walIndex:
		size += (int(binary.LittleEndian.Uint32(b[at+4:])) + walFrameHead - 1) &^ (walFrameHead - 1)
	default:
		return 0, 0
	}
	if size > len(b)-at {
		return 0, 0
	}
	return kind, size
}

// walWhole finds the end of a segment as raft-wal does, which checks the last batch only: behind which byte, after how many
// entries, and where their index begins, 0 in a segment that is not sealed.
func walWhole(b []byte) (end int, entries uint64, index int) {
	type batch struct {
		from, commit, end, index int
		entries                  uint64
	}
	last := batch{end: walFileHead}
	before, n, list := last, uint64(0), 0
	for at := walFileHead; ; {
		kind, size := walFrame(b, at)
		switch kind {
		case walEntry:
			n++
		case walIndex:
			list = at + walFrameHead
		case walCommit:
			next := batch{from: last.end, commit: at, end: at + size, index: list, entries: n}
			if last.entries == 0 {
				next.from = 0 // the first one covers the file's header too
			}
			before, last = last, next
		}
		if kind != 0 {
			at += size
			continue
		}
		if last.commit > 0 && n == last.entries && crc32.Checksum(b[last.from:last.commit], castagnoli) != binary.LittleEndian.Uint32(b[last.commit+4:]) {
			last = before
		}
		return last.end, last.entries, last.index
	}
}

// walBatch says whether a whole batch begins there.
func walBatch(b []byte, from int) bool {
	for at := from; ; {
		kind, size := walFrame(b, at)
		if kind == 0 {
			return false
		}
		if kind == walCommit {
			return crc32.Checksum(b[from:at], castagnoli) == binary.LittleEndian.Uint32(b[at+4:])
		}
		at += size
	}
}

// open reads the segments. What it finds in memory of an earlier one is replaced.
func (w *walLog) open() error {
	var opened *wal.WAL
	err := guard(func() (err error) {
		opened, err = wal.Open(w.dir,
			wal.WithMetaStore(&walMeta{w.stable, w.files.readOnly}), wal.WithSegmentSize(w.segment),
			wal.WithSegmentFiler(segment.NewFiler(w.dir, w.files)), wal.WithLogger(raftLogger(w.log)))
		return err
	})
	var sys *os.PathError
	switch {
	case errors.As(err, &sys):
		return err
	case err != nil:
		return &Damage{File: w.dir, What: "the segments of the log", Cause: err}
	}
	w.mu.Lock()
	old := w.wal
	w.wal = opened
	w.mu.Unlock()
	if old != nil {
		return old.Close()
	}
	return nil
}

func (w *walLog) read(f func(*wal.WAL) error) error {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return guard(func() error { return f(w.wal) })
}

// FirstIndex implements raft.LogStore.
func (w *walLog) FirstIndex() (index uint64, err error) {
	err = w.read(func(l *wal.WAL) (err error) { index, err = l.FirstIndex(); return err })
	return index, err
}

// LastIndex implements raft.LogStore.
func (w *walLog) LastIndex() (index uint64, err error) {
	err = w.read(func(l *wal.WAL) (err error) { index, err = l.LastIndex(); return err })
	return index, err
}

// GetLog implements raft.LogStore.
func (w *walLog) GetLog(index uint64, out *raft.Log) error {
	return w.read(func(l *wal.WAL) error {
		var outer raft.Log
		if err := l.GetLog(index, &outer); err != nil {
			return err
		}
		return unpackEntry(outer.Data, out)
	})
}

// StoreLog implements raft.LogStore.
func (w *walLog) StoreLog(l *raft.Log) error { return w.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. Raft-wal checks no entry that it reads, and
// takes no codec but its own, so an entry with its checksum goes into it as data.
func (w *walLog) StoreLogs(logs []*raft.Log) error {
	outer := make([]*raft.Log, len(logs))
	for i, l := range logs {
		outer[i] = &raft.Log{Index: l.Index, Data: packEntry(l)}
	}
	return w.write(func(l *wal.WAL) error { return l.StoreLogs(outer) })
}

// DeleteRange implements raft.LogStore.
func (w *walLog) DeleteRange(first, last uint64) error {
	return w.write(func(l *wal.WAL) error { return l.DeleteRange(first, last) })
}

func (w *walLog) write(f func(*wal.WAL) error) error {
	w.writing.Lock()
	defer w.writing.Unlock()
	err := w.ready()
	if err == nil {
		err = w.read(f)
	}
	if errors.Is(err, wal.ErrSealed) {
		w.failed = true
		if err = w.ready(); err == nil {
			err = w.read(f)
		}
	}
	w.failed = err != nil
	return err
}

// settle does what raft-wal leaves undone at the end of its tail, where it would take a segment for sealed, or its index for
// being elsewhere, for good. A segment that was sealed when the process ended is noted as such. What a torn batch has left
// is removed: raft-wal believes the index in it. A next segment that could not be made is made by opening.
func (w *walLog) settle() error {
	meta := &walMeta{w.stable, w.files.readOnly}
	state, err := meta.Load("")
	if err != nil || len(state.Segments) == 0 {
		return err
	}
	tail := &state.Segments[len(state.Segments)-1]
	path := filepath.Join(w.dir, segment.FileName(*tail))
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	end, entries, index := walWhole(b)
	if last, err := w.LastIndex(); err != nil || max(last+1, tail.BaseIndex) != tail.BaseIndex+entries {
		return err // raft-wal sees it otherwise: nothing is guessed
	}
	if index == 0 {
		return clearFile(path, end, len(bytes.TrimRight(b, "\x00")))
	}
	tail.SealTime, tail.MaxIndex, tail.IndexStart = time.Now(), tail.BaseIndex+entries-1, uint64(index)
	next := types.SegmentInfo{
		ID: state.NextSegmentID, BaseIndex: tail.MaxIndex + 1, MinIndex: tail.MaxIndex + 1,
		Codec: tail.Codec, CreateTime: time.Now(), SizeLimit: uint32(w.segment),
	}
	state.Segments, state.NextSegmentID = append(state.Segments, next), state.NextSegmentID+1
	return meta.CommitState(state)
}

// clearFile overwrites a part of a file with zeros.
func clearFile(path string, from, to int) error {
	if from >= to {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, to-from), int64(from))
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Ready implements logStore.
func (w *walLog) Ready() error {
	w.writing.Lock()
	defer w.writing.Unlock()
	return w.ready()
}

func (w *walLog) ready() error {
	if !w.failed {
		return nil
	}
	err := w.settle()
	if err == nil {
		err = w.open()
	}
	w.failed = err != nil
	return err
}

// Where implements logStore.
func (w *walLog) Where(index uint64) string {
	state, err := (&walMeta{stable: w.stable}).Load("")
	if err != nil {
		return w.dir
	}
	name := w.dir
	for _, s := range state.Segments { // in order
		if s.BaseIndex <= index {
			name = filepath.Join(w.dir, segment.FileName(s))
		}
	}
	return name
}

// Close implements logStore.
func (w *walLog) Close() error { return w.wal.Close() }

// walMeta keeps raft-wal's list of segments in the stable file.
type walMeta struct {
	stable   *stable
	readOnly bool
}

const walKey = "wal"

// Load implements types.MetaStore.
func (m *walMeta) Load(string) (state types.PersistentState, err error) {
	if b := m.stable.get(walKey); b != nil {
		err = json.Unmarshal(b, &state)
	}
	return state, err
}

// CommitState implements types.MetaStore.
func (m *walMeta) CommitState(state types.PersistentState) error {
	if m.readOnly {
		return errReadOnly
	}
	b, err := json.Marshal(state)
	if err != nil {
		return err
	}
	return m.stable.put(map[string][]byte{walKey: b})
}

// GetStable implements types.MetaStore; raft asks the stable file itself.
func (m *walMeta) GetStable([]byte) ([]byte, error) { return nil, errKeyNotFound }

// SetStable implements types.MetaStore.
func (m *walMeta) SetStable([]byte, []byte) error { return errors.ErrUnsupported }

// Close implements types.MetaStore; the stable file has its own owner.
func (m *walMeta) Close() error { return nil }

var errReadOnly = errors.New("the data folder is open for reading only")

// walFiles is the file system that raft-wal sees.
type walFiles struct {
	fs.FS
	readOnly bool
}

// OpenWriter implements types.VFS.
func (f *walFiles) OpenWriter(dir, name string) (types.WritableFile, error) {
	if !f.readOnly {
		return f.FS.OpenWriter(dir, name)
	}
	return os.Open(filepath.Join(dir, name))
}

// Create implements types.VFS. A file of that name can only be one that an
// earlier try could not finish.
func (f *walFiles) Create(dir, name string, size uint64) (types.WritableFile, error) {
	if f.readOnly {
		return nil, errReadOnly
	}
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	file, err := f.FS.Create(dir, name, size)
	if err != nil {
		path := filepath.Join(dir, name)
		return nil, errors.Join(&os.PathError{Op: "allocate", Path: path, Err: err}, os.Remove(path))
	}
	return file, nil
}

// Delete implements types.VFS.
func (f *walFiles) Delete(dir, name string) error {
	if f.readOnly {
		return nil
	}
	return f.FS.Delete(dir, name)
}
