package blob

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	folderMode = 0o750
	blobMode   = 0o444 // a blob never changes

	stagingName = "tmp"  // unfinished Puts, within the store so that a rename can publish them
	stagingLock = "lock" // in the staging folder: held while a file is made or leftovers are removed
)

// folder is how a file store is written and listed. The store's root holds the blobs and the staging folder.
//
// A staged file is locked (flock) by its writer for as long as it lives, so that an opening process can tell the files
// of the living, even of other hosts on a shared file system, from what the dead have left.
type folder struct {
	root string // absolute
}

func openFolder(root string) (*folder, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	f := &folder{root: root}
	for _, dir := range []string{filepath.Join(root, algorithm), f.staging()} {
		if err := makeFolder(dir); err != nil {
			return nil, err
		}
	}
	return f, f.sweep()
}

func (f *folder) staging() string { return filepath.Join(f.root, stagingName) }

// sweep removes staged files that no living process holds.
func (f *folder) sweep() error {
	return f.exclusively(func() error {
		entries, err := os.ReadDir(f.staging())
		if err != nil {
			return err
		}
		var faults []error
		for _, e := range entries {
			if e.Name() != stagingLock {
				faults = append(faults, removeAbandoned(filepath.Join(f.staging(), e.Name())))
			}
		}
		return errors.Join(faults...)
	})
}

// removeAbandoned removes one staged file unless it is locked or has been published meanwhile.
func removeAbandoned(path string) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove an unfinished upload: %w", err)
	}
	defer file.Close()
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove unfinished upload %s: %w", path, err)
	}
	return nil
}

// stage makes a file for one Put, already locked. Discard closes it and, unless it was published, removes it.
func (f *folder) stage() (file *os.File, discard func(), err error) {
	err = f.exclusively(func() error {
		if file, err = os.CreateTemp(f.staging(), "put-*"); err != nil {
			return err
		}
		discard = func() {
			_ = os.Remove(file.Name()) // fails, as it should, once the file has its final name
			_ = file.Close()           // after the removal: the lock goes with it
		}
		if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			discard()
			return fmt.Errorf("lock %s: %w", file.Name(), err)
		}
		return nil
	})
	return file, discard, err
}

// exclusively runs do while no other process makes or removes staged files here.
func (f *folder) exclusively(do func() error) error {
	lock, err := os.OpenFile(filepath.Join(f.staging(), stagingLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // unlocks
	if err := flock(lock, unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	return do()
}

// publish gives a staged file its final name, durably: first its bytes reach the disk, then the name, then the folders
// that lead to it, whoever of several concurrent writers has made them.
func (f *folder) publish(file *os.File, key string) error {
	final := filepath.Join(f.root, filepath.FromSlash(key))
	if err := file.Sync(); err != nil {
		return err
	}
	shard := filepath.Dir(final)
	if err := os.Mkdir(shard, folderMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Rename(file.Name(), final); err != nil {
		return err
	}
	if err := file.Chmod(blobMode); err != nil { // not before: sweep must be able to open, and lock, what is staged
		return err
	}
	return errors.Join(syncFolder(shard), syncFolder(filepath.Dir(shard)))
}

func (f *folder) remove(_ context.Context, key string) error {
	final := filepath.Join(f.root, filepath.FromSlash(key))
	if err := os.Remove(final); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(final))
}

func (f *folder) list(ctx context.Context) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		top := filepath.Join(f.root, algorithm)
		shards, err := os.ReadDir(top)
		if err != nil {
			yield(Info{}, fmt.Errorf("list blobs: %w", err))
			return
		}
		for _, shard := range shards {
			if !shard.IsDir() {
				continue
			}
			infos, err := readShard(ctx, filepath.Join(top, shard.Name()))
			if err != nil {
				yield(Info{}, fmt.Errorf("list blobs: %w", err))
				return
			}
			for _, info := range infos {
				if !yield(info, nil) {
					return
				}
			}
		}
	}
}

func readShard(ctx context.Context, dir string) ([]Info, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var infos []Info
	for _, e := range entries {
		d, ok := fromHex(e.Name())
		if !ok || e.Name()[:2] != filepath.Base(dir) || !e.Type().IsRegular() {
			continue
		}
		stat, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		infos = append(infos, Info{Digest: d, Size: stat.Size(), ModTime: stat.ModTime()})
	}
	return infos, nil
}

// makeFolder is os.MkdirAll with each new name made durable.
func makeFolder(dir string) error {
	err := os.Mkdir(dir, folderMode)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeFolder(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, folderMode)
	}
	if err == nil {
		return syncFolder(filepath.Dir(dir))
	}
	if info, statErr := os.Stat(dir); statErr == nil && info.IsDir() {
		return nil
	}
	return err
}

// syncFolder makes the names in dir durable.
func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// flock locks f, also when signals interrupt the wait.
func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
