package vision

import (
	"bytes"
	"encoding/binary"
	"errors"
	"image"
	"image/jpeg"
	"image/png"
	"io"
	"math"
	"net/http"
	"strings"

	"golang.org/x/image/draw"
	"golang.org/x/image/webp"

	"github.com/rxvision/rxvision/oip"
)

// MaxPixels is the usual limit of an image: 25 megapixels, 200 MB once decoded at worst.
const MaxPixels = 25_000_000

// Image is a decoded image.
type Image struct {
	pixels      image.Image
	orientation int // EXIF's, 1 to 8
}

// format is a file format; end is what a whole file ends with.
type format struct {
	name, magic, at8, end string
	config                func(io.Reader) (image.Config, error)
	decode                func(io.Reader) (image.Image, error)
}

var formats = []format{
	{"PNG", "\x89PNG\r\n\x1a\n", "", "IEND\xaeB`\x82", png.DecodeConfig, png.Decode},
	{"JPEG", "\xff\xd8\xff", "", "\xff\xd9", jpeg.DecodeConfig, jpeg.Decode},
	{"WebP", "RIFF", "WEBP", "", webp.DecodeConfig, webp.Decode},
}

// Decode decodes a PNG, JPEG or WebP file of at most maxPixels pixels. The size is read first, so that a larger image costs
// nothing. Faults are an *oip.Error with status 415 (another format), 413 (too many pixels) or 400 (broken).
func Decode(data []byte, maxPixels int) (*Image, error) {
	for _, f := range formats {
		if !bytes.HasPrefix(data, []byte(f.magic)) || len(data) < 12 || !bytes.HasPrefix(data[8:], []byte(f.at8)) {
			continue
		}
		config, err := f.config(bytes.NewReader(data))
		if err != nil {
			return nil, f.broken(data, err)
		}
		if pixels := int64(config.Width) * int64(config.Height); pixels > int64(maxPixels) {
			return nil, oip.Errorf(http.StatusRequestEntityTooLarge,
				"the image has %d×%d pixels, %.1f million, at most %.1f million are accepted",
				config.Width, config.Height, float64(pixels)/1e6, float64(maxPixels)/1e6)
		}
		if config.Width == 0 || config.Height == 0 {
			return nil, oip.Errorf(http.StatusBadRequest, "the %s image has no pixels", f.name)
		}
		pixels, err := f.decode(bytes.NewReader(data))
		if err != nil {
			return nil, f.broken(data, err)
		}
		im := &Image{pixels: pixels, orientation: 1}
		if f.name == "JPEG" {
			im.orientation = orientation(data)
		}
		return im, nil
	}
	if len(data) == 0 {
		return nil, oip.Errorf(http.StatusBadRequest, "the image is empty: expected a PNG, JPEG or WebP file")
	}
	return nil, oip.Errorf(http.StatusUnsupportedMediaType,
		"expected a PNG, JPEG or WebP file, got something that begins with %q", data[:min(len(data), 8)])
}

// broken says why data could not be decoded: that a part is missing, where that can be seen, as the decoders do not always tell.
func (f *format) broken(data []byte, err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || !bytes.HasSuffix(data, []byte(f.end)) {
		return oip.Errorf(http.StatusBadRequest, "the %s image is truncated", f.name)
	}
	text := err.Error()
	if _, rest, ok := strings.Cut(text, ": "); ok {
		text = rest // the decoders begin with their own name
	}
	return oip.Errorf(http.StatusBadRequest, "the %s image is broken: %s", f.name, text)
}

// Size is the image's width and height as it is meant to be seen.
func (im *Image) Size() (width, height int) {
	b := im.pixels.Bounds()
	if im.turned() {
		return b.Dy(), b.Dx()
	}
	return b.Dx(), b.Dy()
}

// turned says whether rows are columns as stored.
func (im *Image) turned() bool { return im.orientation >= 5 }

// Tensor makes the model's input of a batch of images.
func (r *Record) Tensor(images ...*Image) oip.Tensor {
	p := &r.Preprocess
	pixels := p.Width * p.Height
	size := 4 * pixels * p.Channels
	t := oip.Tensor{Name: p.Input, Datatype: oip.FP32, Shape: p.shape(int64(len(images))), Data: make([]byte, size*len(images))}
	var values [3][256]uint32 // bits of the element for each pixel value
	for c := range p.Channels {
		for v := range 256 {
			values[c][v] = math.Float32bits(float32((float64(v)*p.Scale - p.Mean[c]) / p.Std[c]))
		}
	}
	pixelStep, channelStep := 4, 4*pixels
	if p.Layout == "NHWC" {
		pixelStep, channelStep = 4*p.Channels, 4
	}
	for i, im := range images {
		small := p.resize(im)
		out := t.Data[i*size:]
		for y := range p.Height {
			for x := range p.Width {
				at := small.PixOffset(im.stored(x, y, small.Rect.Dx(), small.Rect.Dy()))
				rgb := small.Pix[at : at+3 : at+3]
				to := (y*p.Width + x) * pixelStep
				if p.Channels == 1 {
					binary.LittleEndian.PutUint32(out[to:], values[0][luma(rgb)])
					continue
				}
				for c, v := range rgb {
					binary.LittleEndian.PutUint32(out[to+c*channelStep:], values[c][v])
				}
			}
		}
	}
	return t
}

// luma is the brightness of a pixel after ITU-R BT.601, in fixed point; the weights add up to 65536, so grey stays as it is.
func luma(rgb []byte) byte {
	return byte((19595*uint32(rgb[0]) + 38470*uint32(rgb[1]) + 7471*uint32(rgb[2]) + 1<<15) >> 16)
}

// resize scales an image to the model's size, still as it is stored.
func (p *Preprocess) resize(im *Image) *image.RGBA {
	w, h := p.Width, p.Height
	if im.turned() {
		w, h = h, w
	}
	from, to := im.pixels.Bounds(), image.Rect(0, 0, w, h)
	wide := int64(from.Dx())*int64(h) - int64(from.Dy())*int64(w) // above 0: wider than the tensor
	switch {
	case p.Resize == "crop" && wide > 0:
		from = middle(from, max(1, scaled(from.Dy(), w, h)), from.Dy())
	case p.Resize == "crop" && wide < 0:
		from = middle(from, from.Dx(), max(1, scaled(from.Dx(), h, w)))
	case p.Resize == "pad" && wide > 0:
		to = middle(to, w, max(1, scaled(from.Dy(), w, from.Dx())))
	case p.Resize == "pad" && wide < 0:
		to = middle(to, max(1, scaled(from.Dx(), h, from.Dy())), h)
	}
	out := image.NewRGBA(image.Rect(0, 0, w, h))
	if from.Size() == to.Size() {
		draw.Draw(out, to, im.pixels, from.Min, draw.Src)
		return out
	}
	scaler := map[string]draw.Scaler{"nearest": draw.NearestNeighbor, "bilinear": draw.BiLinear, "bicubic": draw.CatmullRom}[p.Filter]
	scaler.Scale(out, to, im.pixels, from, draw.Src, nil)
	return out
}

// scaled is n·a/b, rounded.
func scaled(n, a, b int) int { return int((2*int64(n)*int64(a) + int64(b)) / (2 * int64(b))) }

// middle is the rectangle of the given size in the middle of r.
func middle(r image.Rectangle, w, h int) image.Rectangle {
	x, y := r.Min.X+(r.Dx()-w)/2, r.Min.Y+(r.Dy()-h)/2
	return image.Rect(x, y, x+w, y+h)
}

// stored gives the place, in an image of w×h pixels as stored, of the pixel that is seen at x, y.
func (im *Image) stored(x, y, w, h int) (int, int) {
	switch im.orientation {
	case 2:
		return w - 1 - x, y
	case 3:
		return w - 1 - x, h - 1 - y
	case 4:
		return x, h - 1 - y
	case 5:
		return y, x
	case 6:
		return y, h - 1 - x
	case 7:
		return w - 1 - y, h - 1 - x
	case 8:
		return w - 1 - y, x
	}
	return x, y
}

// orientation finds the orientation in a JPEG file's EXIF data; 1, as stored, when there is none.
// Source: CIPA DC-008 (Exif), tag 0x0112 of the first TIFF directory.
func orientation(data []byte) int {
	for data = data[2:]; len(data) >= 4 && data[0] == 0xff; {
		marker, size := data[1], int(binary.BigEndian.Uint16(data[2:]))
		if marker == 0xda || size < 2 || 2+size > len(data) { // the picture itself begins, or the file is odd
			return 1
		}
		if body := data[4 : 2+size]; marker == 0xe1 && bytes.HasPrefix(body, []byte("Exif\x00\x00")) {
			return tiffOrientation(body[6:])
		}
		data = data[2+size:]
	}
	return 1
}

func tiffOrientation(tiff []byte) int {
	var order binary.ByteOrder = binary.LittleEndian
	switch {
	case bytes.HasPrefix(tiff, []byte("MM\x00*")):
		order = binary.BigEndian
	case !bytes.HasPrefix(tiff, []byte("II*\x00")):
		return 1
	}
	if len(tiff) < 8 {
		return 1
	}
	at := int64(order.Uint32(tiff[4:]))
	if at+2 > int64(len(tiff)) {
		return 1
	}
	entries := tiff[at+2:]
	for range order.Uint16(tiff[at:]) {
		const entry, tag, short = 12, 0x0112, 3
		if len(entries) < entry {
			return 1
		}
		if order.Uint16(entries) == tag && order.Uint16(entries[2:]) == short {
			if o := int(order.Uint16(entries[8:])); o >= 1 && o <= 8 {
				return o
			}
			return 1
		}
		entries = entries[entry:]
	}
	return 1
}
