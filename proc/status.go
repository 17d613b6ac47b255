package proc

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// ErrGone says that the tree an Identity names runs no more (or its machine was rebooted). Collect tells how it ended.
var ErrGone = errors.New("process is gone")

// ErrDetached is what Wait returns after Detach: the tree may well run on.
var ErrDetached = errors.New("detached from process")

// Identity names a running tree so that another process, after a restart or an upgrade, can find it again. Keep it as JSON.
type Identity struct {
	PID        int    `json:"pid"`        // the supervisor, leader of its session
	StartTime  uint64 `json:"start_time"` // of the supervisor: clock ticks after boot, field 22 of /proc/PID/stat
	TaskPID    int    `json:"task_pid"`   // the command itself
	TaskStart  uint64 `json:"task_start"`
	BootID     string `json:"boot_id"` // /proc/sys/kernel/random/boot_id
	StatusFile string `json:"status_file"`
	Cgroup     string `json:"cgroup,omitempty"`
}

// ExitStatus says how a command ended.
type ExitStatus struct {
	Code      int       `json:"code"`   // exit code; 128+Signal when a signal ended it; -1 when Lost
	Signal    int       `json:"signal"` // 0: it exited by itself
	OOMKilled bool      `json:"oom_killed"`
	Lost      bool      `json:"lost,omitempty"` // the supervisor was killed, how the command ended is not known
	Started   time.Time `json:"started"`
	Finished  time.Time `json:"finished"` // Lost: when it was noticed
}

// Success reports whether the command ended by itself with code 0.
func (s ExitStatus) Success() bool { return s.Code == 0 && s.Signal == 0 && !s.Lost }

// String is a sentence part for people: "exit code 3", "killed by signal 9 (killed), out of memory".
func (s ExitStatus) String() string {
	switch {
	case s.Lost:
		return "lost: its supervisor was killed"
	case s.OOMKilled:
		return fmt.Sprintf("exit code %d, killed for exceeding its memory limit", s.Code)
	case s.Signal != 0:
		return fmt.Sprintf("ended by signal %d (%v)", s.Signal, syscall.Signal(s.Signal))
	}
	return fmt.Sprintf("exit code %d", s.Code)
}

// write keeps the status so that it is either whole or absent, also after a power cut.
func (s ExitStatus) write(path string) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once renamed
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readStatus reads what the supervisor left; no file means Lost.
func readStatus(path string) (ExitStatus, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return ExitStatus{Code: -1, Lost: true, Finished: time.Now()}, nil
	}
	var s ExitStatus
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return ExitStatus{Code: -1, Lost: true, Finished: time.Now()}, fmt.Errorf("exit status %s: %w", path, err)
	}
	return s, nil
}
