package proc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotStarted says that no command was ever started for a status file.
var ErrNotStarted = errors.New("nothing was started")

// The identity file lies beside the status file. The starter creates and locks it (flock(2)) and the supervisor inherits the
// lock and writes the identity into it, so: locked and empty means that a start is under way, locked and filled that the
// tree runs, unlocked that it has ended.
const (
	identitySuffix = ".id"
	identityLimit  = 64 << 10
	findPoll       = 5 * time.Millisecond
)

// claim creates and locks the identity file for a new start. At most one tree at a time belongs to a status file.
func claim(statusFile string) (*os.File, error) {
	f, err := os.OpenFile(statusFile+identitySuffix, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("identity file: %w", err)
	}
	if err = lock(f, unix.LOCK_EX); err == nil {
		err = f.Truncate(0)
	}
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("status file %s belongs to a command that still runs", statusFile)
		}
		return nil, fmt.Errorf("identity file: %w", err)
	}
	return f, nil
}

func lock(f *os.File, how int) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var locked error
	if err := conn.Control(func(fd uintptr) { locked = unix.Flock(int(fd), how|unix.LOCK_NB) }); err != nil {
		return err
	}
	return locked
}

// keep writes the identity to the inherited file. It needs no sync: after a crash of the machine nothing runs any more.
func (id Identity) keep(fd int) error {
	b, err := json.Marshal(id)
	if err == nil {
		_, err = unix.Pwrite(fd, append(b, '\n'), 0)
	}
	if err != nil {
		return fmt.Errorf("keep identity: %w", err)
	}
	return nil
}

// Find returns the identity of the command that was last started with this status file, for a caller that died between
// Start and keeping the identity itself. A start that is under way is waited for. The answer may be of a command that has
// ended: Attach tells. It returns ErrNotStarted if there was no start or it did not get as far as running the command.
func Find(ctx context.Context, statusFile string) (Identity, error) {
	f, err := os.Open(statusFile + identitySuffix)
	if errors.Is(err, os.ErrNotExist) {
		return Identity{}, ErrNotStarted
	}
	if err != nil {
		return Identity{}, fmt.Errorf("find process: %w", err)
	}
	defer f.Close()
	for {
		free := lock(f, unix.LOCK_SH) == nil // asked before reading: if free, nobody writes any more
		if free {
			_ = lock(f, unix.LOCK_UN)
		}
		b, err := io.ReadAll(io.NewSectionReader(f, 0, identityLimit))
		if err != nil {
			return Identity{}, fmt.Errorf("find process: %w", err)
		}
		if bytes.HasSuffix(b, []byte("\n")) {
			var id Identity
			if err := json.Unmarshal(b, &id); err != nil {
				return Identity{}, fmt.Errorf("identity file of %s: %w", statusFile, err)
			}
			return id, nil
		}
		if free {
			return Identity{}, ErrNotStarted
		}
		select {
		case <-ctx.Done():
			return Identity{}, ctx.Err()
		case <-time.After(findPoll):
		}
	}
}
