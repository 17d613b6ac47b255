package raftstore

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"
)

// Names within the data folder.
const (
	lockFile    = "lock"
	idFile      = "node-id"
	failureFile = "failure.json"
	tmpFolder   = "tmp"
	snapFolder  = "snapshots"
	tmpSuffix   = ".tmp"

	storeKey = "log_store" // in the stable file: LogBbolt or LogWAL
	idKey    = "server_id" // in the stable file
)

// Damage says which part of a data folder does not hold what was written there.
type Damage struct {
	File  string // path
	What  string // the damaged thing in it: a log entry, a table's record…
	Cause error  // nil when What says it all
}

// Error implements error.
func (d *Damage) Error() string {
	if d.Cause == nil {
		return fmt.Sprintf("%s: %s is damaged", d.File, d.What)
	}
	return fmt.Sprintf("%s: %s is damaged: %v", d.File, d.What, d.Cause)
}

// Unwrap gives the cause.
func (d *Damage) Unwrap() error { return d.Cause }

// wayOut adds to the error of damage what the operator can do.
func wayOut(dir string, err error) error {
	var damage *Damage
	if !errors.As(err, &damage) {
		return err
	}
	return fmt.Errorf("%w. Nothing was changed. With healthy peers, rebuild this server from them: `rxvision server rebuild -data-dir %s`, then start it; "+
		"a region of one server is brought back from a saved snapshot", err, dir)
}

// deviceFault says whether err comes from the device or the file system, not
// from what is in the files.
func deviceFault(err error) bool {
	for _, e := range []error{
		syscall.EIO, syscall.EROFS, syscall.ENXIO, syscall.ENODEV, syscall.ESTALE, syscall.ETIMEDOUT, syscall.EBADF,
		syscall.ENOSPC, syscall.EDQUOT, os.ErrClosed,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Unwritable is the error of Open when the data folder cannot be written, now or
// since a failure that the server's last run recorded. OpenReadOnly shows what
// can still be read, and tells when writes go through again.
type Unwritable struct {
	Dir   string
	Since time.Time
	Cause error
}

// Error implements error.
func (u *Unwritable) Error() string {
	return fmt.Sprintf("data folder %s cannot be written since %s: %v", u.Dir, u.Since.UTC().Format(time.RFC3339), u.Cause)
}

// Unwrap gives the cause.
func (u *Unwritable) Unwrap() error { return u.Cause }

// failureRecord is DIR/failure.json: why the last run ended.
type failureRecord struct {
	Time  time.Time
	Error string
}

// recordFailure writes failure.json as well as the disk allows.
func recordFailure(dir string, at time.Time, reason error) error {
	b, err := json.MarshalIndent(failureRecord{at.UTC(), reason.Error()}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, failureFile), append(b, '\n'), 0o600)
}

// checkFailure tries a write, and looks whether the last run ended because of
// the disk. If so, and writes go through now, the log is written anew before it
// is trusted: after a failed fsync the kernel shows bytes that may not be on disk.
func checkFailure(dir string, retried func(record failureRecord)) error {
	record := failureRecord{Time: time.Now()}
	b, err := os.ReadFile(filepath.Join(dir, failureFile))
	failed := err == nil
	if failed {
		if err := json.Unmarshal(b, &record); err != nil {
			record.Error = fmt.Sprintf("it says %q", b) // cut short by the fault that it tells of
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return &Unwritable{dir, record.Time, err}
	}
	switch err := writeProbe(dir, 1); {
	case err == nil:
	case failed:
		return &Unwritable{dir, record.Time, fmt.Errorf("%w (the server had ended because: %s)", err, record.Error)}
	case full(err):
		return nil // there may be enough for a start
	default:
		return &Unwritable{dir, record.Time, err}
	}
	if !failed {
		return nil
	}
	names, err := logFiles(dir)
	for _, name := range append(names, stableFile) {
		err = errors.Join(err, rewrite(filepath.Join(dir, name)))
	}
	if err = errors.Join(err, os.Remove(filepath.Join(dir, failureFile)), syncFolder(dir)); err != nil {
		return &Unwritable{dir, record.Time, err}
	}
	retried(record)
	return nil
}

// logFiles are the files of the log, relative to the data folder.
func logFiles(dir string) ([]string, error) {
	segments, err := filepath.Glob(filepath.Join(dir, walFolder, "*.wal"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, path := range segments {
		names = append(names, filepath.Join(walFolder, filepath.Base(path)))
	}
	if _, err := os.Stat(filepath.Join(dir, boltLogFile)); err == nil {
		names = append(names, boltLogFile)
	}
	return names, nil
}

// rewrite replaces a file by a synced copy of what can be read of it.
func rewrite(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path+tmpSuffix, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path+tmpSuffix))
	}
	return errors.Join(os.Rename(path+tmpSuffix, path), syncFolder(filepath.Dir(path)))
}

// probe writes so many bytes to the folder, syncs them, reads them back and
// deletes them.
func writeProbe(dir string, size int) (err error) {
	f, err := os.CreateTemp(dir, "probe-*"+tmpSuffix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	want := bytes.Repeat([]byte(newUUID()), size/len(newUUID())+1)
	if _, err := f.Write(want); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s reads back other bytes than were written", f.Name())
	}
	return nil
}

// lockFolder takes the folder for this process until the file is closed.
func lockFolder(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil { // a folder that cannot be written is read all the same
		if f, err = os.Open(path); err != nil {
			return nil, err
		}
	}
	for end := time.Now().Add(lockTimeout); ; time.Sleep(lockTimeout / 20) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		case time.Now().After(end):
			return nil, errors.Join(fmt.Errorf("data folder %s is in use by another rxvision server", dir), f.Close())
		}
	}
}

// openFolder makes the folder, takes its lock, removes what a killed server left
// half-written, opens stable file and log, and reads or makes the server's ID.
func (s *Store) openFolder() error {
	dir := s.cfg.Dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var err error
	if s.lock, err = lockFolder(dir); err != nil {
		return err
	}
	err = checkFailure(dir, func(r failureRecord) {
		s.log.Warn("the disk works again; the log was written anew", "folder", dir, "failed", r.Time, "error", r.Error)
	})
	if err != nil {
		return err
	}
	if err := clearTemporary(dir); err != nil {
		return err
	}
	if err := s.openDisk(); err != nil {
		return err
	}
	id, err := serverID(dir, s.disk.stable)
	if err != nil {
		return err
	}
	s.id = raft.ServerID(id)
	return syncFolder(dir)
}

func clearTemporary(dir string) error {
	tmp := filepath.Join(dir, tmpFolder)
	err := errors.Join(os.RemoveAll(tmp), os.Mkdir(tmp, 0o700))
	for _, pattern := range []string{"*" + tmpSuffix, filepath.Join(snapFolder, "*"+tmpSuffix), filepath.Join(walFolder, "*"+tmpSuffix)} {
		paths, e := filepath.Glob(filepath.Join(dir, pattern))
		err = errors.Join(err, e)
		for _, path := range paths {
			err = errors.Join(err, os.RemoveAll(path))
		}
	}
	return err
}

// openDisk opens stable file and log, and verifies them.
func (s *Store) openDisk() error {
	dir := s.cfg.Dir
	st, err := openOrCreateStable(dir, s.cfg.LogStore)
	if err != nil {
		return err
	}
	s.disk = &disk{
		stable: st, log: s.log, dir: dir, fail: s.failDisk, silence: s.silence, fault: s.cfg.fault, closing: s.closing, appends: appendSeconds(), writes: map[int]time.Time{},
		patience: time.Hour, // until the timers are known
	}
	if st.healed != "" {
		s.log.Warn("a copy of term and vote was damaged and is restored from the other", "file", st.path, "fault", st.healed)
	}
	kind := string(st.get(storeKey))
	if s.cfg.LogStore != "" && kind != s.cfg.LogStore {
		s.log.Warn("the data folder keeps the log store that it was made with", "folder", dir, "has", kind, "asked", s.cfg.LogStore)
	}
	if s.disk.entries, err = openLog(kind, dir, st, cmp.Or(s.cfg.segment, walSegment), s.log, false); err != nil {
		return err
	}
	return s.disk.verify(func() uint64 { return newestWhole(dir) })
}

// complete compares what was applied with what log and snapshots reach up to.
func (d *disk) complete(snaps *snapshots) error {
	reach := d.last.Load()
	list, err := snaps.List()
	if err != nil {
		return err
	}
	if len(list) > 0 {
		reach = max(reach, list[0].Index)
	}
	if reach < d.mark.Commit {
		return &Damage{File: d.dir, What: "the data folder", Cause: fmt.Errorf(
			"entries up to %d were applied, but its log and snapshots end at %d", d.mark.Commit, reach)}
	}
	return nil
}

// openOrCreateStable opens the stable file; a folder without one gets it if it
// holds nothing else of a server.
func openOrCreateStable(dir, kind string) (*stable, error) {
	st, err := openStable(dir, false)
	if !errors.Is(err, os.ErrNotExist) {
		return st, err
	}
	if _, err := os.Stat(filepath.Join(dir, "raft.db")); err == nil {
		return nil, errors.New("it was made by a development version before 0.1; save a snapshot with that version and restore it into an empty folder")
	}
	names, err := logFiles(dir)
	if err != nil {
		return nil, err
	}
	snaps, err := filepath.Glob(filepath.Join(dir, snapFolder, "*"))
	if err != nil {
		return nil, err
	}
	if len(names)+len(snaps) > 0 {
		return nil, &Damage{File: filepath.Join(dir, stableFile), What: "the file with term and vote", Cause: errors.New("it is missing beside a log or snapshots")}
	}
	setDefault(&kind, DefaultLogStore)
	if !slices.Contains([]string{LogBbolt, LogWAL}, kind) {
		return nil, fmt.Errorf("log store %q is not known; it can be %s or %s", kind, LogWAL, LogBbolt)
	}
	if err := createStable(dir, map[string][]byte{storeKey: []byte(kind)}); err != nil {
		return nil, err
	}
	return openStable(dir, false)
}

// serverID reads the server's ID from the data folder, or makes one for good. The
// file is for operators; the stable file has the same.
func serverID(dir string, st *stable) (string, error) {
	path := filepath.Join(dir, idFile)
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	shown, id := strings.TrimSpace(string(b)), string(st.get(idKey))
	if id == "" {
		id = newUUID()
		if err := st.put(map[string][]byte{idKey: []byte(id)}); err != nil {
			return "", err
		}
	}
	if shown == id {
		return id, nil
	}
	return id, os.WriteFile(path, []byte(id+"\n"), 0o600)
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// failDisk ends the store because of its disk. What the device did is recorded,
// so that the next start does not trust it blindly.
func (s *Store) failDisk(err error) {
	if end, over := s.begin(); over == nil {
		defer end() // Close waits for the record, which this disk may hold up
	}
	s.fail(err)
	var damage *Damage
	if !errors.As(err, &damage) {
		if e := recordFailure(s.cfg.Dir, time.Now(), err); e != nil {
			s.log.Error("could not record why the server ends", "error", e)
		}
	}
}

// unwritable makes an error of the device an *Unwritable.
func unwritable(dir string, err error) error {
	var known *Unwritable
	if errors.As(err, &known) || !deviceFault(err) {
		return err
	}
	return &Unwritable{dir, time.Now(), err}
}

// isSystem says whether the operating system refused something.
func isSystem(err error) bool {
	var path *fs.PathError
	var number syscall.Errno
	return errors.As(err, &path) || errors.As(err, &number)
}
