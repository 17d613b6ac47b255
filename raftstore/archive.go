package raftstore

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

// An archive is what `nomad operator snapshot save` stores: a gzipped tar of
// meta.json (raft's description), state.bin and SHA256SUMS of both. state.bin is
// a msgpack map (archiveHead) and then, for each record, the type byte of its
// table and the record as cluster.AppendStored writes it: a msgpack map.
//
// Neither the sums nor gzip's own CRC cover every byte of the file, so the gzip
// header carries one more field: "RX", the SHA-256 of everything behind it.
const (
	archiveFormat = 2 // 1: allocations as cluster.Marshal gives them, which 2 reads too
	memberMeta    = "meta.json"
	memberState   = "state.bin"
	memberSums    = "SHA256SUMS"
	maxMeta       = 1 << 20 // bytes of meta.json and of SHA256SUMS
	// maxRecord bounds one record in bytes. Commands are at most MaxEntry; records grow by several.
	maxRecord = 16 << 20
	// DefaultMaxArchive bounds an archive, packed and unpacked, when Tuning.MaxArchive is not set.
	DefaultMaxArchive = 4 << 30
)

// sealPrefix is how every archive begins (RFC 1952): deflate, one extra field,
// no time, of sub-field RX with 32 bytes.
var sealPrefix = []byte{0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 36, 0, 'R', 'X', sha256.Size, 0}

// archiveHead opens state.bin.
type archiveHead struct {
	Format      int
	Index, Term uint64
	Created     int64 // unix nanoseconds
	CreatedBy   string
}

// Info describes an archive.
type Info struct {
	Index, Term uint64 // of the last command in it
	Created     time.Time
	CreatedBy   string
	Size        int64 // bytes of state.bin
	Tables      []TableInfo
}

// TableInfo counts one table's records in an archive.
type TableInfo struct {
	Name    string
	Records int
	Bytes   int64
}

// Archive is a finished archive in a temporary file, to be read once.
type Archive struct {
	Info
	Length int64  // bytes of the archive
	Digest string // its SHA-256 as the HTTP header Digest wants it: "sha-256=<base64>"
	file   *temp
}

// Read implements io.Reader.
func (a *Archive) Read(p []byte) (int, error) { return a.file.Read(p) }

// Close removes the file.
func (a *Archive) Close() error { return a.file.remove() }

// SaveArchive writes the state into an archive. The caller closes it.
func (s *Store) SaveArchive(ctx context.Context) (_ *Archive, err error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	defer func() {
		if err != nil {
			err = fmt.Errorf("save snapshot: %w", err)
		}
	}()
	if err := s.ReadIndex(ctx, false); err != nil { // before that the log may not be applied
		return nil, err
	}
	snap, index, term, err := s.fsm.view()
	if err != nil {
		return nil, err
	}
	conf := s.raft.GetConfiguration()
	if err := conf.Error(); err != nil {
		return nil, err
	}
	return writeArchive(&paced{ctx, s.closing, &pace{applied: s.fsm.appliedIndex}}, s.fsm.tmp, snap, s.cfg.createdBy(), raft.SnapshotMeta{
		Index: index, Term: term, Configuration: conf.Configuration(), ConfigurationIndex: s.fsm.membersIndex(),
	})
}

// writeArchive makes an archive in the folder tmp; meta brings index, term and members.
func writeArchive(p *paced, tmp string, snap *cluster.Snapshot, createdBy string, meta raft.SnapshotMeta) (*Archive, error) {
	created := time.Now().UTC()
	head := archiveHead{Format: archiveFormat, Index: meta.Index, Term: meta.Term, Created: created.UnixNano(), CreatedBy: createdBy}

	// The tar header comes before the member and tells its size: so a file of its own first.
	state, err := tempFile(tmp, "archive-state-")
	if err != nil {
		return nil, err
	}
	defer state.remove() //nolint:errcheck // cleared at the next start if not now
	sum := sha256.New()
	tables, err := writeRecords(p.writer(io.MultiWriter(state, sum)), snap, head)
	if err != nil {
		return nil, err
	}
	info := Info{Index: meta.Index, Term: meta.Term, Created: created, CreatedBy: createdBy, Tables: tables}
	if info.Size, err = state.Seek(0, io.SeekCurrent); err != nil {
		return nil, err
	}
	if _, err := state.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	meta.Version, meta.ID, meta.Size = raft.SnapshotVersionMax, fmt.Sprintf("%d-%d-%d", meta.Term, meta.Index, created.UnixMilli()), info.Size
	file, err := tempFile(tmp, "archive-")
	if err != nil {
		return nil, err
	}
	a := &Archive{Info: info, file: file}
	if err := a.pack(&meta, sum.Sum(nil), io.TeeReader(state, p.writer(io.Discard))); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// paced is work that stops when ctx ends or the store closes, and gives way to writes.
type paced struct {
	ctx     context.Context
	closing <-chan struct{}
	pace    *pace
}

func (p *paced) writer(w io.Writer) io.Writer { return &pacedWriter{p, w} }

type pacedWriter struct {
	*paced
	io.Writer
}

func (w *pacedWriter) Write(b []byte) (int, error) {
	select {
	case <-w.ctx.Done():
		return 0, w.ctx.Err()
	case <-w.closing:
		return 0, errClosing
	default:
	}
	w.pace.did(len(b))
	return w.Writer.Write(b)
}

// writeRecords writes state.bin.
func writeRecords(w io.Writer, snap *cluster.Snapshot, head archiveHead) ([]TableInfo, error) {
	out := bufio.NewWriterSize(w, paceBytes)
	if _, err := out.Write(cluster.Marshal(head)); err != nil {
		return nil, err
	}
	tally := newTally()
	var value []byte
	err := snap.Records(func(t *cluster.Table, _ string, record any) error {
		value = cluster.AppendStored(value[:0], record)
		tally.add(t, len(value))
		if err := out.WriteByte(t.Record); err != nil {
			return err
		}
		_, err := out.Write(value)
		return err
	})
	if err != nil {
		return nil, err
	}
	return tally.tables, out.Flush()
}

// tally counts records by table.
type tally struct {
	tables []TableInfo
	place  map[*cluster.Table]int
}

func newTally() *tally {
	t := &tally{place: map[*cluster.Table]int{}}
	for i, table := range cluster.Tables {
		t.tables = append(t.tables, TableInfo{Name: table.Name})
		t.place[table] = i
	}
	return t
}

func (t *tally) add(table *cluster.Table, bytes int) {
	info := &t.tables[t.place[table]]
	info.Records++
	info.Bytes += int64(bytes)
}

// pack writes the archive's file; sum is that of state.
func (a *Archive) pack(meta *raft.SnapshotMeta, sum []byte, state io.Reader) error {
	metaJSON, err := json.Marshal(meta)
	if err != nil {
		return err
	}
	sums := fmt.Sprintf("%x  %s\n%x  %s\n", sha256.Sum256(metaJSON), memberMeta, sum, memberState)
	err = packMembers(a.file, a.Created,
		member{memberMeta, int64(len(metaJSON)), bytes.NewReader(metaJSON)},
		member{memberState, meta.Size, state},
		member{memberSums, int64(len(sums)), strings.NewReader(sums)})
	if err != nil {
		return err
	}
	return a.finish()
}

// member is one file of the tar.
type member struct {
	name string
	size int64
	body io.Reader
}

// packMembers writes the gzipped tar with an empty seal. Nothing follows the
// tar's end marker: the CLI takes padding for a fault.
func packMembers(w io.Writer, modified time.Time, members ...member) error {
	buffered := bufio.NewWriterSize(w, paceBytes)             // deflate writes a few bytes at a time
	zip, err := gzip.NewWriterLevel(buffered, gzip.BestSpeed) // the best takes four times as long for a third of the bytes
	if err != nil {
		return err
	}
	zip.Extra = append(sealPrefix[12:len(sealPrefix):len(sealPrefix)], make([]byte, sha256.Size)...)
	out := tar.NewWriter(zip)
	for _, m := range members {
		head := tar.Header{Typeflag: tar.TypeReg, Name: m.name, Size: m.size, Mode: 0o600, ModTime: modified.Truncate(time.Second), Format: tar.FormatUSTAR}
		if m.size >= 8<<30 {
			head.Format = tar.FormatGNU // USTAR ends at 8 GiB
		}
		if err := out.WriteHeader(&head); err != nil {
			return err
		}
		if _, err := io.Copy(out, m.body); err != nil {
			return err
		}
	}
	if err := out.Close(); err != nil {
		return err
	}
	if err := zip.Close(); err != nil {
		return err
	}
	return buffered.Flush()
}

// finish fills the seal in, and length and digest.
func (a *Archive) finish() error {
	behind := int64(len(sealPrefix) + sha256.Size)
	if _, err := a.file.Seek(behind, io.SeekStart); err != nil {
		return err
	}
	sum := sha256.New()
	n, err := io.Copy(sum, a.file)
	if err != nil {
		return err
	}
	if _, err := a.file.WriteAt(sum.Sum(slices.Clone(sealPrefix)), 0); err != nil { // gzip notes in its header how hard it tried
		return err
	}
	if _, err := a.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	sum.Reset()
	if _, err := io.Copy(sum, a.file); err != nil {
		return err
	}
	a.Length, a.Digest = behind+n, "sha-256="+base64.StdEncoding.EncodeToString(sum.Sum(nil))
	_, err = a.file.Seek(0, io.SeekStart)
	return err
}

// VerifyArchive reads a whole archive, packed and unpacked at most limit bytes
// (DefaultMaxArchive when 0), and says what is in it. Its records are decoded and
// the state that they make is checked. The error is one sentence with
// CodeInvalid or CodeTooLarge.
func VerifyArchive(r io.Reader, limit int64) (*Info, error) {
	info, _, err := readArchive(context.Background(), r, limit, nil, nil)
	return info, err
}

// RestoreArchive replaces the state by an archive's: all of it, or nothing when
// there is any error. Records keep their indexes; later writes get indexes above
// both the archive's and the log's. The servers' records and the cluster's name
// stay those of the running cluster. A server that is not the leader brings the
// archive to it.
func (s *Store) RestoreArchive(ctx context.Context, r io.Reader) (*Info, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	if s.IsLeader() {
		return s.restoreHere(ctx, r)
	}
	return s.forwardRestore(ctx, r)
}

// restoreHere is the leader's part of RestoreArchive.
func (s *Store) restoreHere(ctx context.Context, r io.Reader) (*Info, error) {
	s.restoring.Lock()
	defer s.restoring.Unlock()
	if !s.IsLeader() {
		return nil, cluster.ErrNoLeader
	}
	made, err := s.convert(ctx, r)
	if err != nil {
		return nil, err
	}
	defer made.remove() //nolint:errcheck // cleared at the next start if not now
	if err := ctx.Err(); err != nil {
		return nil, err // from here on it is raft's
	}
	meta := raft.SnapshotMeta{Version: raft.SnapshotVersionMax, Index: made.head.Index, Term: made.head.Term, Size: made.size}
	err = s.settle(func() error { return s.raft.Restore(&meta, made, enqueueTimeout) })
	if fatal := s.Err(); fatal != nil {
		return nil, fatal
	}
	if err != nil && lostLeader(err) {
		return nil, cluster.ErrNoLeader
	}
	if err != nil {
		return nil, fmt.Errorf("restore snapshot: %w", err)
	}
	if err := s.barrier(); err != nil { // raft has written an entry of its own
		return nil, cmpErr(s.Err(), cluster.ErrNoLeader)
	}
	info := made.info
	s.log.Info("restored a snapshot", "index", info.Index, "created", info.Created, "created_by", info.CreatedBy)
	return info, nil
}

// prepared is a snapshot file on its way to raft's store, with the state that it holds.
type prepared struct {
	path  string
	size  int64
	info  *Info
	state *cluster.State
	head  snapshotHead
}

// Read implements io.Reader for raft, which copies from here to a snapshotSink.
// That one takes the file as it is instead.
func (p *prepared) Read([]byte) (int, error) { return 0, errors.ErrUnsupported }

func (p *prepared) remove() error { return os.RemoveAll(p.path) }

// convert makes an archive into a snapshot file, verified whole.
func (s *Store) convert(ctx context.Context, r io.Reader) (_ *prepared, err error) {
	file, err := tempFile(s.fsm.tmp, "restore-")
	if err != nil {
		return nil, fmt.Errorf("restore snapshot: %w", err)
	}
	defer file.Close()
	p := &prepared{path: file.Name()}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.remove())
		}
	}()
	w, err := createSnapshot(p.path)
	if err != nil {
		return nil, fmt.Errorf("restore snapshot: write it to the data folder: %w", err)
	}
	if p.info, p.state, err = readArchive(ctx, r, s.cfg.MaxArchive, w, s.State().Snapshot()); err != nil {
		return nil, err
	}
	p.head = p.info.head()
	stat, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("restore snapshot: %w", err)
	}
	p.size = stat.Size()
	return p, nil
}

func (i *Info) head() snapshotHead {
	return snapshotHead{Index: i.Index, Term: i.Term, CreatedBy: i.CreatedBy}
}

func invalid(format string, args ...any) *cluster.Error {
	return cluster.Errorf(cluster.CodeInvalid, "snapshot archive "+format, args...)
}

// readArchive reads, checks and decodes an archive. Its records go into the file
// too, if there is one; that is finished, or closed when there is an error. What
// live, if any, knows of servers and of the cluster's name takes the place of what
// the archive knows of them.
func readArchive(ctx context.Context, r io.Reader, limit int64, file *snapshotWriter, live *cluster.Snapshot) (_ *Info, state *cluster.State, err error) {
	a := archiveReader{load: newLoader(file), live: live}
	defer func() {
		if err != nil {
			_ = a.load.stop() // the other error is the reason
		}
	}()
	setDefault(&limit, DefaultMaxArchive)
	a.limit = limit
	raw := &limitReader{ctx: ctx, r: r, left: limit, limit: limit}
	begin := make([]byte, len(sealPrefix)+sha256.Size)
	switch n, err := io.ReadFull(raw, begin); {
	case raw.err != nil:
		return nil, nil, raw.err
	case n < 2 || begin[0] != sealPrefix[0] || begin[1] != sealPrefix[1]:
		return nil, nil, invalid("is not a gzip file")
	case err != nil:
		return nil, nil, invalid("is cut short: it ends after %d bytes", n)
	case !bytes.Equal(begin[:len(sealPrefix)], sealPrefix):
		return nil, nil, invalid("was not written by rxvision, or its first bytes were changed")
	}
	sum := sha256.New()
	err = a.read(bufio.NewReader(io.MultiReader(bytes.NewReader(begin), io.TeeReader(raw, sum))))
	// Whatever was found inside, a file that is not what was written is the better reason.
	if _, e := io.Copy(sum, raw); e != nil {
		err = e
	}
	switch {
	case raw.err != nil:
		return nil, nil, raw.err
	case !bytes.Equal(sum.Sum(nil), begin[len(sealPrefix):]) && errors.Is(err, io.ErrUnexpectedEOF):
		return nil, nil, invalid("is cut short: it ends after %d bytes", limit-raw.left)
	case !bytes.Equal(sum.Sum(nil), begin[len(sealPrefix):]):
		return nil, nil, invalid("is damaged: its bytes do not match the checksum in its header")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, nil, invalid("is cut short inside")
	case err != nil:
		var plain *cluster.Error
		if !errors.As(err, &plain) {
			err = invalid("cannot be read: %v", err)
		}
		return nil, nil, err
	}
	if state, err = a.load.finish(a.info.head()); err != nil {
		return nil, nil, a.fault(err)
	}
	return &a.info, state, nil
}

// limitReader stops at a limit and when ctx ends, and remembers why.
type limitReader struct {
	ctx         context.Context
	r           io.Reader
	left, limit int64
	err         error // not io.EOF
}

func (l *limitReader) Read(p []byte) (int, error) {
	if l.err == nil {
		l.err = l.ctx.Err()
	}
	if l.err != nil {
		return 0, l.err
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left+1)])
	if l.left -= int64(n); l.left < 0 {
		l.err = tooLarge(l.limit)
		return 0, l.err
	}
	if err != nil && err != io.EOF {
		l.err = fmt.Errorf("read snapshot archive: %w", err)
		err = l.err
	}
	return n, err
}

func tooLarge(limit int64) error {
	return cluster.Errorf(cluster.CodeTooLarge, "snapshot archive is over the limit of %d bytes", limit)
}

// archiveReader takes an archive apart.
type archiveReader struct {
	limit int64
	info  Info
	load  *loader
	live  *cluster.Snapshot
	meta  raft.SnapshotMeta
	sums  map[string]string // member → hex, as SHA256SUMS says
	found map[string]hash.Hash
}

func (a *archiveReader) read(r *bufio.Reader) error {
	zip, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	zip.Multistream(false)
	unpacked := &limitReader{ctx: context.Background(), r: zip, left: a.limit, limit: a.limit}
	members := tar.NewReader(unpacked)
	a.found = map[string]hash.Hash{}
	for {
		head, err := members.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := a.member(head, members); err != nil {
			return err
		}
	}
	if n, err := io.Copy(io.Discard, unpacked); err != nil || n > 0 {
		return cmpErr(err, invalid("has %d bytes after the end of its tar", n))
	}
	if n, err := io.Copy(io.Discard, r); err != nil || n > 0 {
		return cmpErr(err, invalid("has bytes after the end of its gzip stream"))
	}
	return a.compare()
}

// cmpErr is err, or otherwise if that is nil.
func cmpErr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// member reads one file of the tar.
func (a *archiveReader) member(head *tar.Header, body io.Reader) error {
	if head.Typeflag != tar.TypeReg || a.found[head.Name] != nil {
		return invalid("holds %q twice or not as a plain file", head.Name)
	}
	sum := sha256.New()
	a.found[head.Name] = sum
	body = io.TeeReader(body, sum)
	limit := int64(maxMeta)
	switch head.Name {
	case memberState:
		limit = a.limit
	case memberMeta, memberSums:
	default:
		return invalid("holds %q, which does not belong there", head.Name)
	}
	if head.Size > limit {
		return tooLarge(limit)
	}
	switch head.Name {
	case memberState:
		a.info.Size = head.Size
		return a.state(bufio.NewReaderSize(body, 1<<20))
	case memberMeta:
		b, err := io.ReadAll(body)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &a.meta); err != nil {
			return invalid("holds a %s that is not JSON: %v", memberMeta, err)
		}
	case memberSums:
		b, err := io.ReadAll(body)
		if err != nil {
			return err
		}
		a.sums = map[string]string{}
		for line := range strings.Lines(string(b)) {
			sum, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
			if !ok {
				return invalid("holds a %s that is not of lines with a sum and a name", memberSums)
			}
			a.sums[name] = sum
		}
	}
	return nil
}

// state decodes state.bin.
func (a *archiveReader) state(r *bufio.Reader) error {
	value, err := readValue(r, nil, maxRecord)
	if err != nil {
		return err
	}
	var head archiveHead
	if err := cluster.Unmarshal(value, &head); err != nil {
		return invalid("begins its records wrongly: %v", err)
	}
	if head.Format != archiveFormat && head.Format != 1 {
		return invalid("is of format %d; this version of rxvision restores format %d", head.Format, archiveFormat)
	}
	a.info.Index, a.info.Term, a.info.CreatedBy = head.Index, head.Term, head.CreatedBy
	a.info.Created = time.Unix(0, head.Created).UTC()
	tally := newTally()
	for n := 1; ; n++ {
		kind, err := r.ReadByte()
		if errors.Is(err, io.EOF) {
			a.info.Tables = tally.tables
			if a.live == nil {
				return nil
			}
			if err := a.live.Membership(a.load.add); err != nil {
				return a.fault(err)
			}
			return nil
		}
		if err != nil {
			return err
		}
		table := cluster.TableOf(kind)
		if table == nil {
			return invalid("holds a record of type %d (number %d), which this version of rxvision does not know", kind, n)
		}
		if value, err = nextValue(r, value[:0]); err != nil {
			return err
		}
		tally.add(table, len(value))
		if a.live != nil && cluster.OfMembership(table, value) {
			continue
		}
		if err := a.load.add(table, value); err != nil {
			return a.fault(err)
		}
	}
}

// fault says what the loader's error means for the archive.
func (a *archiveReader) fault(err error) error {
	var bad *recordError
	switch {
	case errors.As(err, &bad):
		return invalid("holds a record that cannot be read (number %d): %v", bad.number, bad.cause)
	case errors.Is(err, errUnfit):
		return invalid("holds records that do not fit together: %v", err)
	}
	return fmt.Errorf("restore snapshot: write it to the data folder: %w", err)
}

// compare checks what the members say of each other.
func (a *archiveReader) compare() error {
	for _, name := range []string{memberMeta, memberState, memberSums} {
		if a.found[name] == nil {
			return invalid("lacks %s", name)
		}
	}
	for _, name := range []string{memberMeta, memberState} {
		if got := hex.EncodeToString(a.found[name].Sum(nil)); a.sums[name] != got {
			return invalid("is damaged: the checksum of %s in %s does not match", name, memberSums)
		}
	}
	switch {
	case len(a.sums) != 2:
		return invalid("has a %s that names other files too", memberSums)
	case a.meta.Version != raft.SnapshotVersionMax:
		return invalid("is of version %d; this version of rxvision restores version %d", a.meta.Version, raft.SnapshotVersionMax)
	case a.meta.Size != a.info.Size, a.meta.Index != a.info.Index, a.meta.Term != a.info.Term:
		return invalid("is inconsistent: %s and %s disagree on size, index or term", memberMeta, memberState)
	}
	return nil
}

// nextValue is readValue, quick where the value lies in r's buffer as a whole.
func nextValue(r *bufio.Reader, buf []byte) ([]byte, error) {
	here, err := r.Peek(r.Buffered())
	if err != nil {
		return nil, err
	}
	n := valueSize(here)
	if n == 0 || n > maxRecord {
		return readValue(r, buf, maxRecord)
	}
	buf = append(buf, here[:n]...)
	_, err = r.Discard(n)
	return buf, err
}

// valueSize is how many bytes the msgpack value takes that b begins with; 0 when
// it does not end in b, or is none.
func valueSize(b []byte) int {
	at := 0
	number := func(size int) (n int) { // big-endian, behind the type byte; at moves on
		if size > len(b)-at {
			at = len(b) + 1
			return 0
		}
		for _, c := range b[at : at+size] {
			n = n<<8 | int(c)
		}
		at += size
		return n
	}
	for values := 1; values > 0; values-- {
		if at >= len(b) {
			return 0
		}
		c := b[at]
		at++
		switch {
		case c <= 0x7f, c >= 0xe0, c == 0xc0, c == 0xc2, c == 0xc3: // small number, nil, false, true
		case c <= 0x8f: // map
			values += 2 * int(c&0x0f)
		case c <= 0x9f: // array
			values += int(c & 0x0f)
		case c <= 0xbf: // string
			at += int(c & 0x1f)
		case c >= 0xc4 && c <= 0xc6: // bytes
			at += number(1 << (c - 0xc4))
		case c >= 0xd9 && c <= 0xdb: // string
			at += number(1 << (c - 0xd9))
		case c == 0xca: // float32
			at += 4
		case c == 0xcb: // float64
			at += 8
		case c >= 0xcc && c <= 0xcf: // unsigned
			at += 1 << (c - 0xcc)
		case c >= 0xd0 && c <= 0xd3: // signed
			at += 1 << (c - 0xd0)
		case c == 0xdc, c == 0xdd: // array
			values += number(2 << (c - 0xdc))
		case c == 0xde, c == 0xdf: // map
			values += 2 * number(2<<(c-0xde))
		default:
			return 0 // readValue knows the rare ones
		}
	}
	if at > len(b) {
		return 0
	}
	return at
}

// readValue appends one msgpack value, as it lies in r, to buf; over limit bytes
// is an error. It needs no stack, however deep the value is, and believes no
// length before the bytes are there.
func readValue(r *bufio.Reader, buf []byte, limit int) ([]byte, error) {
	take := func(n uint64) error {
		if n > uint64(limit-len(buf)) {
			return invalid("holds a record over %d bytes", limit)
		}
		for n > 0 {
			at, step := len(buf), min(n, 1<<16)
			buf = append(buf, make([]byte, step)...)
			if _, err := io.ReadFull(r, buf[at:]); err != nil {
				return unexpected(err)
			}
			n -= step
		}
		return nil
	}
	length := func(size uint64) (uint64, error) { // a big-endian number of size bytes
		if err := take(size); err != nil {
			return 0, err
		}
		var b [8]byte
		copy(b[8-size:], buf[uint64(len(buf))-size:])
		return binary.BigEndian.Uint64(b[:]), nil
	}
	for values := uint64(1); values > 0; values-- { // still to be read
		if err := take(1); err != nil {
			return buf, err
		}
		c := buf[len(buf)-1]
		var body, more uint64 // bytes, then values, that follow
		var err error
		switch {
		case c <= 0x7f, c >= 0xe0, c == 0xc0, c == 0xc2, c == 0xc3: // small number, nil, false, true
		case c <= 0x8f: // map
			more = 2 * uint64(c&0x0f)
		case c <= 0x9f: // array
			more = uint64(c & 0x0f)
		case c <= 0xbf: // string
			body = uint64(c & 0x1f)
		case c >= 0xc4 && c <= 0xc6: // bytes
			body, err = length(1 << (c - 0xc4))
		case c >= 0xc7 && c <= 0xc9: // extension: a type byte more
			body, err = length(1 << (c - 0xc7))
			body++
		case c == 0xca: // float32
			body = 4
		case c == 0xcb: // float64
			body = 8
		case c >= 0xcc && c <= 0xcf: // unsigned
			body = 1 << (c - 0xcc)
		case c >= 0xd0 && c <= 0xd3: // signed
			body = 1 << (c - 0xd0)
		case c >= 0xd4 && c <= 0xd8: // fixed extension: a type byte more
			body = 1<<(c-0xd4) + 1
		case c >= 0xd9 && c <= 0xdb: // string
			body, err = length(1 << (c - 0xd9))
		case c == 0xdc, c == 0xdd: // array
			more, err = length(2 << (c - 0xdc))
		case c == 0xde, c == 0xdf: // map
			more, err = length(2 << (c - 0xde))
			more *= 2
		default:
			return buf, invalid("holds a byte that is not msgpack (0x%02x)", c)
		}
		if err == nil {
			err = take(body)
		}
		if err != nil {
			return buf, err
		}
		values += more
	}
	return buf, nil
}

// unexpected makes the end of input, in the middle of something, an error that says so.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
