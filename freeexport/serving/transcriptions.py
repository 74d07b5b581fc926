"""OpenAI's /v1/audio/transcriptions and /v1/audio/translations.

A request is a form with a WAV file. A response is JSON, text or subtitles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import Message
from typing import Any, Literal

from freeexport.serving.errors import ApiError, invalid
from runtime import GenerationResult, Segment, SpeechOptions
from runtime.options import Mode

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
LARGEST_AUDIO = 64 << 20  # bytes of a form: 35 minutes of 16-bit mono at 16 kHz
MOST_PARTS = 32  # in a form
LARGEST_HEAD = 4 << 10  # bytes of the headers of a part
LARGEST_TEXT = 64 << 10  # bytes of all fields together, except the file


@dataclass(frozen=True)
class Transcription:
    """Validated request.

    Attributes:
        file: Content of the WAV file.
        model: Model name. Default: the only model.
        format: Format of the response.
        options: Options of the session.
    """

    file: bytes
    model: str | None
    format: Literal["json", "text", "srt", "verbose_json", "vtt"]
    options: SpeechOptions

    @classmethod
    def of(
        cls,
        fields: dict[str, bytes],
        task: Literal["transcribe", "translate"],
        mode: Mode | None,
        limit: float | None,
    ) -> Transcription:
        """Validate the fields of a form. Removes `file` from `fields`.

        Args:
            fields: Fields of the form.
            task: Transcribe, or translate to English.
            mode: The server's mode.
            limit: The server's time limit in seconds.

        Raises:
            ApiError: If a field is missing, unknown or invalid.
            OptionError: If an option is invalid.
        """
        file = fields.pop("file", None)
        if not file:
            raise invalid(
                "file", "file is missing or empty; send a WAV file as the field `file` of a form"
            )
        text = {name: value.decode("utf-8", "replace").strip() for name, value in fields.items()}
        granularity = text.pop(
            "timestamp_granularities[]", text.pop("timestamp_granularities", "segment")
        )
        format = text.pop("response_format", "json")
        if format not in FORMATS:
            raise invalid(
                "response_format",
                f"response_format is {format[:80]!r}; choose {', '.join(FORMATS)}",
            )
        if granularity != "segment":
            raise invalid(
                "timestamp_granularities", "word timestamps are not supported; use segment"
            )
        if text.pop("stream", "false").lower() not in ("false", "0"):
            raise invalid("stream", "streaming transcriptions are not supported; omit stream")
        model = text.pop("model", None)
        prompt = text.pop("prompt", None)
        language = text.pop("language", None)
        temperature = text.pop("temperature", "0")
        for name in text:
            raise invalid(name[:80], f"{name[:80]} is not supported; remove it")
        try:
            degree = float(temperature)
        except ValueError:
            raise invalid(
                "temperature", f"temperature is {temperature[:80]!r}; give a number from 0 to 1"
            ) from None
        return cls(
            file,
            model or None,
            format,  # type: ignore[arg-type]
            SpeechOptions(
                task=task,
                language=language or None,
                initial_prompt=prompt or None,
                temperature=degree or None,
                timestamps=format in ("srt", "verbose_json", "vtt"),
                mode=mode,
                deadline=limit,
            ),
        )

    def answer(self, result: GenerationResult, seconds: float) -> dict[str, Any] | str:
        """Return the body of the response. A string is sent as plain text.

        Args:
            result: Result of the session.
            seconds: Duration of the audio.
        """
        segments = result.segments or ()
        if self.format == "text":
            return result.text + "\n"
        if self.format == "srt":
            return "".join(
                f"{number}\n{_times(each, ',')}{_line(each)}"
                for number, each in enumerate(segments, 1)
            )
        if self.format == "vtt":
            return "WEBVTT\n\n" + "".join(f"{_times(each, '.')}{_line(each)}" for each in segments)
        if self.format == "json":
            return {"text": result.text}
        return {
            "task": self.options.task,
            "language": result.language,
            "duration": round(seconds, 3),
            "text": result.text,
            "segments": [_fields(number, each) for number, each in enumerate(segments)],
        }


def _fields(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": int(segment.start * 100),
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.token_ids),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob or 0.0,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob or 0.0,
    }


def _times(segment: Segment, point: str) -> str:
    def clock(seconds: float) -> str:
        whole = round(seconds * 1000)
        return (
            f"{whole // 3_600_000:02}:{whole // 60_000 % 60:02}:"
            f"{whole // 1000 % 60:02}{point}{whole % 1000:03}"
        )

    return f"{clock(segment.start)} --> {clock(segment.end)}\n"


def _line(segment: Segment) -> str:
    return f"{segment.text.strip().replace('-->', '->')}\n\n"


def form_fields(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the fields of a multipart/form-data body.

    Raises:
        ApiError: If the body is not such a form, is too large, or repeats a field.
    """
    header = Message()
    header["Content-Type"] = content_type[:LARGEST_HEAD]
    boundary = header.get_param("boundary")
    if (
        header.get_content_type() != "multipart/form-data"
        or not isinstance(boundary, str)
        or not boundary
    ):
        raise _invalid("the body is not a form; send multipart/form-data with a field `file`")
    fields: dict[str, bytes] = {}
    line = b"--" + boundary.encode("ascii", "replace")
    texts = 0
    end = body.find(line)
    while end >= 0 and not body.startswith(b"--", end + len(line)):
        begin = end + len(line)
        end = body.find(b"\r\n" + line, begin)
        if end < 0:
            break
        split = body.find(b"\r\n\r\n", begin, min(end, begin + LARGEST_HEAD))
        name = re.search(
            rb'(?:^|;)\s*name="([^"]*)"', body[begin : max(begin, split)].replace(b"\r\n", b";")
        )
        if name is None:
            raise _invalid("a form part has no name; send fields as multipart/form-data")
        key = name[1].decode("utf-8", "replace")
        if key in fields:
            raise _invalid(f"the form field {key[:80]!r} is repeated; send it once")
        fields[key] = body[split + 4 : end]
        texts += 0 if key == "file" else len(fields[key])
        if len(fields) > MOST_PARTS or texts > LARGEST_TEXT:
            raise _invalid(
                f"the form has more than {MOST_PARTS} fields "
                f"or {LARGEST_TEXT} bytes beside the file"
            )
        end += 2
    return fields


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, "invalid_form")
