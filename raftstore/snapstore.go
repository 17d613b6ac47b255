package raftstore

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

const (
	snapFile = "state.bin"
	metaFile = "meta.json"
	// retained snapshots; the older one is for the case that the newer cannot be read.
	retained = 2
)

// snapshots is raft's store of snapshots: a folder each, with the bbolt file and
// a description of it. Both have a checksum. A snapshot is there when its folder
// has its final name.
type snapshots struct {
	dir string // the data folder's folder for them
	log *slog.Logger

	mu     sync.Mutex
	faults map[string]error     // what was found damaged, by what it is
	ready  map[string]*prepared // by ID: the state that was just written is at hand
}

// snapshotMeta is meta.json.
type snapshotMeta struct {
	raft.SnapshotMeta
	SHA256 string // of state.bin, in hex
	CRC32C uint32 // of this description with CRC32C 0
}

func (m snapshotMeta) encode() ([]byte, error) {
	m.CRC32C = 0
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	m.CRC32C = crc32.Checksum(b, castagnoli)
	return json.MarshalIndent(m, "", "  ")
}

func openSnapshots(dir string, l *slog.Logger) (*snapshots, error) {
	s := &snapshots{dir: filepath.Join(dir, snapFolder), log: l, faults: map[string]error{}, ready: map[string]*prepared{}}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("snapshot folder: %w", err)
	}
	return s, syncFolder(dir)
}

// listSnapshots reads the descriptions of a data folder's snapshots, newest first.
// The error names those that are damaged; the others are there all the same.
func listSnapshots(dir string) ([]*snapshotMeta, error) {
	folders, err := os.ReadDir(filepath.Join(dir, snapFolder))
	if err != nil {
		return nil, err
	}
	var list []*snapshotMeta
	var faults error
	for _, f := range folders {
		if !f.IsDir() || strings.HasSuffix(f.Name(), tmpSuffix) {
			continue
		}
		meta, err := readSnapshotMeta(filepath.Join(dir, snapFolder, f.Name(), metaFile))
		if err != nil {
			faults = errors.Join(faults, err)
			continue
		}
		list = append(list, meta)
	}
	slices.SortFunc(list, func(a, b *snapshotMeta) int {
		return cmp.Or(cmp.Compare(b.Term, a.Term), cmp.Compare(b.Index, a.Index), strings.Compare(b.ID, a.ID))
	})
	return list, faults
}

func readSnapshotMeta(path string) (*snapshotMeta, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var meta snapshotMeta
	err = json.Unmarshal(b, &meta)
	if err == nil {
		var want []byte
		if want, err = meta.encode(); err == nil && !bytes.Equal(b, want) {
			err = errors.New("it does not match its checksum")
		}
	}
	if err == nil && meta.ID != filepath.Base(filepath.Dir(path)) {
		err = fmt.Errorf("it describes the snapshot %q", meta.ID)
	}
	if err != nil {
		return nil, &Damage{File: path, What: "the description of a snapshot", Cause: err}
	}
	return &meta, nil
}

// verifySnapshot compares a snapshot's file with its hash and gives its path.
func verifySnapshot(dir string, meta *snapshotMeta) (string, error) {
	path := filepath.Join(dir, snapFolder, meta.ID, snapFile)
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, err := hashFile(f)
	if err != nil {
		return "", err
	}
	if sum != meta.SHA256 {
		return "", &Damage{File: path, What: "the snapshot", Cause: errors.New("its SHA-256 is not the one that was recorded")}
	}
	return path, nil
}

func hashFile(f *os.File) (string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	sum := sha256.New()
	if _, err := io.CopyBuffer(sum, struct{ io.Reader }{f}, make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// newestWhole is raft's index of the newest snapshot whose file is what was
// written; 0 for none.
func newestWhole(dir string) uint64 {
	list, _ := listSnapshots(dir) // what is damaged counts as not there
	for _, meta := range list {
		if _, err := verifySnapshot(dir, meta); err == nil {
			return meta.Index
		}
	}
	return 0
}

// List implements raft.SnapshotStore. Damaged descriptions are passed over as
// long as another one is whole.
func (s *snapshots) List() ([]*raft.SnapshotMeta, error) {
	list, err := listSnapshots(filepath.Dir(s.dir))
	s.note("descriptions", err)
	if err != nil && len(list) == 0 {
		return nil, err
	}
	if err != nil {
		s.log.Error("a snapshot is damaged; another one is used", "error", err)
	}
	var out []*raft.SnapshotMeta
	for _, meta := range list[:min(len(list), retained)] {
		out = append(out, &meta.SnapshotMeta)
	}
	return out, nil
}

// snapshotSource is an opened snapshot that knows where it lies, so that the
// bbolt file is read in place.
type snapshotSource struct {
	io.ReadCloser
	path    string
	index   uint64    // raft's: at or above the last command's
	members uint64    // index of the Raft configuration in it
	ready   *prepared // the state in it, if it is at hand
}

// Open implements raft.SnapshotStore. The file's hash is verified by then.
func (s *snapshots) Open(id string) (_ *raft.SnapshotMeta, _ io.ReadCloser, err error) {
	defer func() { s.note(id, err) }()
	meta, err := readSnapshotMeta(filepath.Join(s.dir, id, metaFile))
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	ready := s.ready[id]
	delete(s.ready, id)
	s.mu.Unlock()
	path := filepath.Join(s.dir, id, snapFile)
	if ready == nil {
		if _, err := verifySnapshot(filepath.Dir(s.dir), meta); err != nil {
			return nil, nil, err
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	return &meta.SnapshotMeta, snapshotSource{f, path, meta.Index, meta.ConfigurationIndex, ready}, nil
}

func (s *snapshots) note(what string, err error) {
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.faults[what] = err
	}
}

// damage is all that was found damaged; nil for nothing.
func (s *snapshots) damage() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(slices.Collect(maps.Values(s.faults))...)
}

// Create implements raft.SnapshotStore.
func (s *snapshots) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	if version != raft.SnapshotVersionMax {
		return nil, fmt.Errorf("snapshots of version %d are not supported", version)
	}
	meta := snapshotMeta{SnapshotMeta: raft.SnapshotMeta{
		Version: version, ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixMilli()), Index: index, Term: term,
		Configuration: c, ConfigurationIndex: cIndex,
	}}
	dir := filepath.Join(s.dir, meta.ID+tmpSuffix)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	f, err := os.OpenFile(filepath.Join(dir, snapFile), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &snapshotSink{store: s, meta: meta, dir: dir, file: f, sum: sha256.New()}, nil
}

// snapshotSink takes a snapshot: raft writes what came from a peer, the state
// machine its file in place, and a restore has the file already.
type snapshotSink struct {
	store *snapshots
	meta  snapshotMeta
	dir   string // until Close gives it its name
	file  *os.File
	sum   hash.Hash // of what was written; nil when the file is written in place
	ready *prepared // what ReadFrom took
	done  bool
}

// ID implements raft.SnapshotSink.
func (s *snapshotSink) ID() string { return s.meta.ID }

// Write implements io.Writer.
func (s *snapshotSink) Write(b []byte) (int, error) {
	s.sum.Write(b)
	return s.file.Write(b)
}

// inPlace gives the path of the empty file, for the caller to fill.
func (s *snapshotSink) inPlace() string {
	s.sum = nil
	return s.file.Name()
}

// ReadFrom implements io.ReaderFrom, so that the file of a restore is not copied.
func (s *snapshotSink) ReadFrom(r io.Reader) (int64, error) {
	p, ok := r.(*prepared)
	if !ok {
		return io.Copy(struct{ io.Writer }{s}, r)
	}
	path := s.inPlace()
	if err := os.Rename(p.path, path); err != nil {
		return 0, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	if err := s.file.Close(); err != nil {
		return 0, errors.Join(err, f.Close())
	}
	s.file, s.ready = f, p
	return p.size, nil
}

// Close implements raft.SnapshotSink: the snapshot is there now, or there is an
// error and nothing of it.
func (s *snapshotSink) Close() error {
	if s.done {
		return nil
	}
	s.done = true
	err := s.finish()
	err = errors.Join(err, s.file.Close())
	if err == nil {
		if err = os.Rename(s.dir, filepath.Join(s.store.dir, s.meta.ID)); err == nil {
			err = syncFolder(s.store.dir)
		}
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(s.dir))
	}
	if s.ready != nil {
		s.store.mu.Lock()
		clear(s.store.ready)
		s.store.ready[s.meta.ID] = s.ready
		s.store.mu.Unlock()
	}
	s.store.reap()
	return nil
}

func (s *snapshotSink) finish() error {
	if err := s.file.Sync(); err != nil {
		return err
	}
	stat, err := s.file.Stat()
	if err != nil {
		return err
	}
	s.meta.Size = stat.Size()
	if s.sum != nil {
		s.meta.SHA256 = hex.EncodeToString(s.sum.Sum(nil))
	} else if s.meta.SHA256, err = hashFile(s.file); err != nil {
		return err
	}
	b, err := s.meta.encode()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.dir, metaFile), os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close(), syncFolder(s.dir))
}

// Cancel implements raft.SnapshotSink.
func (s *snapshotSink) Cancel() error {
	if s.done {
		return nil
	}
	s.done = true
	return errors.Join(s.file.Close(), os.RemoveAll(s.dir))
}

// reap deletes what is older than the retained ones. Damaged ones stay, for
// whoever wants to look at them, until a rebuild moves them away.
func (s *snapshots) reap() {
	list, _ := listSnapshots(filepath.Dir(s.dir)) // what is damaged was said when it was met
	for _, meta := range list[min(len(list), retained):] {
		if err := os.RemoveAll(filepath.Join(s.dir, meta.ID)); err != nil {
			s.log.Warn("could not delete an old snapshot", "snapshot", meta.ID, "error", err)
		}
	}
}
