package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/rxvision/rxvision/cluster"
)

// diskRetry is how often a write that found the disk full is tried again.
const diskRetry = 250 * time.Millisecond

// disk stands between raft and its bbolt file, because raft panics where that
// fails. A full disk is waited out: log entries get an error, raft's own few
// words (term, vote, the entry that begins a term) are tried again until there is
// room. Any other fault ends the store with a reason: after a failed fsync nobody
// knows what the disk holds.
type disk struct {
	*raftboltdb.BoltStore
	log     *slog.Logger
	dir     string
	fail    func(error)
	closing <-chan struct{}
	running atomic.Bool // false while raft starts: errors end Open then
	noSpace atomic.Bool // the last write found the disk full
}

// errFull says that nothing was stored because the disk is full.
func (d *disk) errFull() error {
	return cluster.Errorf(cluster.CodeUnavailable,
		"the disk of the server's data folder %s is full: nothing was stored; free some space and try again", d.dir)
}

// full says whether err means that nothing was written for lack of space. Only a
// plain write or growth that was refused counts; the same error from an fsync
// leaves the file in doubt.
func full(err error) bool {
	var refused *fs.PathError
	return errors.As(err, &refused) && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT))
}

// GetLog implements raft.LogStore.
func (d *disk) GetLog(index uint64, l *raft.Log) error {
	err := d.BoltStore.GetLog(index, l)
	if err == nil || errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	return d.broken(fmt.Errorf("read log entry %d of %s: %w", index, d.dir, err))
}

// StoreLog implements raft.LogStore.
func (d *disk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore: all entries are on disk, or none.
func (d *disk) StoreLogs(logs []*raft.Log) error {
	write := func() error { return d.BoltStore.StoreLogs(logs) }
	if len(logs) == 1 && logs[0].Type == raft.LogNoop {
		return d.insist(write) // raft would step down and win the next term, over and over
	}
	err := write()
	d.noSpace.Store(full(err))
	switch {
	case err == nil:
		return nil
	case full(err):
		return d.errFull()
	}
	return d.broken(fmt.Errorf("write the log in %s: %w", d.dir, err))
}

// DeleteRange implements raft.LogStore.
func (d *disk) DeleteRange(first, last uint64) error {
	err := d.BoltStore.DeleteRange(first, last)
	if err == nil || full(err) {
		return err // the entries stay, and are deleted after the next snapshot
	}
	return d.broken(fmt.Errorf("shorten the log in %s: %w", d.dir, err))
}

// Set implements raft.StableStore.
func (d *disk) Set(key, value []byte) error {
	return d.insist(func() error { return d.BoltStore.Set(key, value) })
}

// SetUint64 implements raft.StableStore.
func (d *disk) SetUint64(key []byte, value uint64) error {
	return d.insist(func() error { return d.BoltStore.SetUint64(key, value) })
}

func (d *disk) insist(write func() error) error {
	for said := false; ; {
		err := write()
		d.noSpace.Store(full(err))
		if err == nil || !d.running.Load() {
			return err
		}
		if !full(err) {
			return d.broken(fmt.Errorf("write raft's term and vote in %s: %w", d.dir, err))
		}
		if !said {
			d.log.Error("data folder's disk is full; there is no leader until some space is free", "folder", d.dir)
			said = true
		}
		select {
		case <-time.After(diskRetry):
		case <-d.closing:
			runtime.Goexit() // see broken
		}
	}
}

// broken ends the store. Raft would panic on the error, in a goroutine of its
// own, so that goroutine ends here instead; its deferred clean-up answers whoever
// waits for it.
func (d *disk) broken(err error) error {
	if d.running.Load() {
		d.fail(err)
		runtime.Goexit()
	}
	return err
}

// raftLogger passes raft's messages on to l. Raft tells of each election as a
// warning; one level less fits what operators expect.
func raftLogger(l *slog.Logger) hclog.Logger {
	h := hclog.NewInterceptLogger(&hclog.LoggerOptions{Level: hclog.Off})
	h.RegisterSink(logSink{l})
	return h
}

type logSink struct{ *slog.Logger }

// Accept implements hclog.SinkAdapter.
func (s logSink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn:
		to = slog.LevelInfo
	case hclog.Error:
		to = slog.LevelError
	}
	if !s.Enabled(context.Background(), to) {
		return
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok {
			args[i] = fmt.Sprintf(f[0].(string), f[1:]...)
		}
	}
	s.Log(context.Background(), to, msg, args...) //nolint:sloglint // the words are raft's
}
